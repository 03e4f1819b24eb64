"""Options whose value is a list of integers."""

from moesaic.errors import ConfigError


def integers(option: str, text: str) -> list[int]:
    """Return the numbers of `4` or `4,4,8`. Raises: ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} ({text}) is not a list of integers; one number, or several with commas between, is required; "
            f"write for example {option} 4,4,8."
        ) from None


def expert_counts(text: str) -> int | list[int]:
    """Return what --experts says: a count for all MoE layers, or one for each."""
    counts = integers("--experts", text)
    return counts[0] if len(counts) == 1 else counts
