"""Cold-start traces: rewritten answers whose every snippet is run, verified in form and answer.

    python launch/cold_start.py --config=configs/cold_start.py:tiny
    python launch/cold_start.py --config=configs/cold_start.py:qwen2_5_32b --config.model.path=Qwen2.5-32B-Instruct \
        --config.traces=ReTool-SFT.parquet --config.golds=problems.jsonl
    python launch/cold_start.py --config=configs/cold_start.py:smollm2_135m --config.model.path=SmolLM2-135M-Instruct \
        --config.worked="('reasoning_gym:gsm_symbolic?held_out_templates=15',)"

Hardware: CPU; 12,000 embedded problems take half a minute on 2 cores. What verification drops is counted
by its reason, and answers that were held against nothing but the trace's own last box are counted apart.
"""

from ml_collections import ConfigDict, config_dict

from configs import base, cards


def get_config(arg: str = 'tiny') -> ConfigDict:
    return cards.fitted(make, 'cold_start', arg)


def make(arg: str) -> ConfigDict:
    return ConfigDict(
        {
            'run': base.run(arg, 'cold_start'),
            'traces': config_dict.placeholder(str),  # a file of rewritten answers; tiny: none, made from the task
            # A problem file with the gold answers of traces that have none but their own last box (ReTool-SFT's rows).
            'golds': config_dict.placeholder(str),
            'worked': (),  # generators with worked solutions, in the place of traces
            'problems': 12000,  # of the embedded task, or of `worked`
            'mix': base.mix(arg),
            'max_tokens': base.turns(arg).max_tokens,  # longer traces are dropped
            'model': base.model(arg),
            'sandbox': base.sandbox(arg),
            'feedback': base.feedback(arg),
            'reward': base.reward(),
        }
    )
