"""Episodes from a model and a sandbox; `from retool_jax.rollout import Engine, open_model` is all a notebook needs."""

__all__ = ['Engine', 'Model', 'open_model']


def __getattr__(name: str):
    # Imported when asked for: a module of this room alone (journal, turns) loads without the model's code.
    if name in __all__:
        from retool_jax.rollout import library

        return getattr(library, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
