"""The exceptions fastrl raises. Every message says what was expected, what came, and what to do."""


class FastRLError(Exception):
    """Base class of every error that fastrl raises on purpose."""


class ConfigError(FastRLError, ValueError):
    """A setting, recipe, command line or output folder cannot be used."""


class ShapeError(FastRLError, ValueError):
    """Tensors do not have the shapes, dtypes, devices or index range an operation needs."""


class DataError(FastRLError, ValueError):
    """A data file or a row of it cannot be used; names file, line and field."""


class ModelError(FastRLError, ValueError):
    """A checkpoint or tokenizer cannot be loaded, or does not fit its partner."""


class BackendUnavailableError(FastRLError, RuntimeError):
    """A backend was named that cannot run this operation here."""


class NumericsError(FastRLError, RuntimeError):
    """A NaN or an infinity where a number was needed, or training that left its bounds."""


class RewardError(FastRLError, RuntimeError):
    """A reward function raised, did not return in time, or returned what cannot be scores."""


class DeviceMemoryError(FastRLError, RuntimeError):
    """No memory is left even for the smallest piece of work; says what to make smaller."""


class CheckpointError(FastRLError, RuntimeError):
    """A checkpoint cannot be written, read or continued from; names folder, file and cause."""
