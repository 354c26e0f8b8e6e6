"""One rule for reading the config.json files that diffusers and transformers write.

Each network keeps a frozen dataclass whose fields are the keys it honours. Every other key must hold
the one value our code assumes, listed next to the network as `FIXED`; anything else is refused by name,
because a silently ignored `use_linear_projection: true` is a wrong picture and no error.
"""

import dataclasses


def read_config(cls: type, config: dict, fixed: dict, bookkeeping: frozenset = frozenset()):
    """Build the dataclass `cls` from a config.json dict.

    Fields of `cls` missing from `config` keep their default. `fixed` maps the other known keys to the one
    value supported. Keys in `bookkeeping`, and keys starting with "_", say nothing about the computation
    and are skipped. Unknown keys pass only when they are off (None or False).

    Raises ValueError, naming the key and its value, for anything our code would not reproduce.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    known = {}
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        if key in fields:
            known[key] = value
        elif key.startswith("_") or key in bookkeeping:
            continue
        elif key in fixed:
            if value != fixed[key]:
                raise ValueError(f"{cls.__name__}: {key} = {value!r} is not supported, only {fixed[key]!r}")
        elif value is not None and value is not False:
            raise ValueError(f"{cls.__name__}: unknown setting {key} = {value!r}; not Stable Diffusion 1.x")
    return cls(**known)
