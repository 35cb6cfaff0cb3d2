"""Why a trace is kept or dropped, in words."""

REASONS = {
    'kept': 'kept',
    'format': 'tags, their order or a fence are not those of a rollout',
    'execution': 'a snippet fails, or prints something else than the trace says',
    'answer': 'the answer is not the gold answer',
    'length': 'longer than max_tokens',
}
# And of one that is to be rewritten, before and after.
MORE_REASONS = {
    'trace': 'the text trace itself does not say the gold answer',
    'verdict': 'the model that was asked holds the text trace for wrong',
    'rewriter': 'the rewriter made nothing of it',
    'filter': 'left out by a filter',
}
