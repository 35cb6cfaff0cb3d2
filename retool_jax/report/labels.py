"""Titles and colours of models, kinds of episodes and their parts; colours are classes k-NAME of page.css."""

from __future__ import annotations

from retool_jax.report.runs import Part

# Models of a demo as summary.json names them, in the order of the story.
MODELS = {
    'base': ('Start', 'base'),
    'base_tool': ('Start, with interpreter', 'textsft'),
    'sft': ('Cold start', 'sft'),
    'tool_rl': ('RL with interpreter', 'tool'),
    'text_sft': ('Text cold start', 'textsft'),
    'text_rl': ('RL, text only', 'text'),
}
SHORT = {
    'base': 'Start',
    'base_tool': 'Start, tools',
    'sft': 'Cold start',
    'tool_rl': 'RL, tools',
    'text_sft': 'Text start',
    'text_rl': 'RL, text',
}
# Of the demo, the headline's first: of the embedded task, of generated problems.
SETS = ('new_operands', 'new_wording', 'larger_range', 'new_numbers', 'new_templates')
# Kinds of training: of metrics lines and of parts with a step.
KINDS = {
    'tool': ('with interpreter', 'tool'),
    'text': ('text only', 'text'),
    '': ('this run', 'tool'),
    'step': ('this run', 'tool'),
}
_COLOURS = ('tool', 'text', 'sft', 'textsft')


def model(name: str, index: int = 0) -> tuple[str, str]:
    """Title and colour of a scored model (or set, in an evaluation run)."""
    return MODELS.get(name, (name.replace('_', ' '), _COLOURS[index % len(_COLOURS)]))


def kind(name: str) -> tuple[str, str]:
    """Title and colour of a kind of training."""
    return KINDS.get(name, (name.replace('_', ' '), 'tool'))


def split_evaluation(part: Part) -> tuple[str, str]:
    """Model and set of an evaluation's part: 'val_tool_rl_new_wording' → ('tool_rl', 'new_wording').

    The model is '' where the name begins with none that is known.
    """
    name = part.name.removeprefix('val_')
    for known in sorted(MODELS, key=len, reverse=True):
        if name.startswith(f'{known}_'):
            return known, name[len(known) + 1 :]
    return '', name


def order(part: Part) -> tuple:
    """A key that sorts parts as the story goes: training with tools, text only, then evaluations by model."""
    if part.training:
        kinds = list(KINDS)
        return 0, kinds.index(part.kind) if part.kind in kinds else len(kinds), part.kind, part.step
    name, data = split_evaluation(part)
    models = list(MODELS)
    place = SETS.index(data) if data in SETS else len(SETS)
    return 1, models.index(name) if name else len(models), f'{place}{data}', 0


def title(part: Part) -> str:
    """Title of the kind of a part, without its step."""
    if part.training:
        if part.kind == 'step':  # the only model of its run
            return 'training'
        return f'RL, {KINDS[part.kind][0]}' if part.kind in KINDS else part.kind.replace('_', ' ')
    name, data = split_evaluation(part)
    data = data.replace('_', ' ')
    return f'{MODELS[name][0]}: {data}' if name else data
