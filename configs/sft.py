"""Supervised fine-tuning on verified traces.

    python launch/sft.py --config=configs/sft.py:tiny --config.traces=runs/cold_start_tiny/episodes
    python launch/sft.py --config=configs/sft.py:qwen2_5_32b --config.model.path=Qwen2.5-32B-Instruct \
        --config.traces=runs/cold_start_qwen2_5_32b/episodes

Hardware: tiny, 2 CPU cores, 3 minutes; 32B, a v5p-64 slice or 32 × 80 GiB. The model is written to
`final/` of the run's folder as a Hugging Face directory. --config.sft.evaluation_share=0.05 keeps a share of the
problems apart, and `final/` is then the checkpoint of the lowest loss on them.

Whose values the real sizes have: the paper's two passes; the rest, which it does not state, is of verl's recipe (R) for
ReTool's 2,000 traces. That recipe whole:
--config.sft.epochs=6 --config.optimizer.warmup_steps=38 --config.sft.evaluation_share=0.0
"""

from ml_collections import ConfigDict, config_dict

from configs import base, cards


def get_config(arg: str = 'tiny') -> ConfigDict:
    return cards.fitted(make, 'sft', arg)


def make(arg: str) -> ConfigDict:
    tiny = base.is_tiny(arg)
    return ConfigDict(
        {
            'run': base.run(arg, 'sft'),
            'traces': config_dict.placeholder(str),  # episodes/ of a cold start
            'unreadable': 'refuse',  # traces whose gold answers cannot be read; 'leave_out' those and list them
            'model': base.model(arg),
            'lora': base.lora(),
            'mesh': base.mesh(arg),
            'forward': base.forward(arg),
            # Warm-up over a tenth of the steps, which are 2,000 traces × 2 ÷ 32 = 125.
            'optimizer': (
                base.optimizer(3e-3, schedule='cosine', warmup_steps=20, weight_decay=0.1, b2=0.95)
                if tiny
                else base.optimizer(1e-5, schedule='cosine', warmup_steps=12, b2=0.95)
            ),
            'sft': {
                'steps': 540 if tiny else 125,
                'epochs': 0 if tiny else 2,
                'batch_tokens': 2900 if tiny else 131072,
                'evaluation_share': 0.0 if tiny else 0.02,
            },
            'checkpoints': base.checkpoints(every=100 if tiny else 31),  # 31: half a pass over 2,000 traces
        }
    )
