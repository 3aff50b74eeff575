"""The errors flowbridge raises: each message says what was given, what was expected and what to do."""


class FlowbridgeError(Exception):
    """Root of every error that flowbridge raises on purpose."""


class ConfigurationError(FlowbridgeError, ValueError):
    """A setting (TOML, keyword argument) cannot be used as given."""


class CoordinateError(FlowbridgeError, ValueError):
    """Internal coordinates cannot be defined or evaluated; the message names the atom."""


class ModelFileError(FlowbridgeError, ValueError):
    """A model file is truncated, altered, of another program, too new, or not what its header says."""


class MoleculeMismatchError(FlowbridgeError, ValueError):
    """A potential was given to particles that are not the ones it was made for."""


class ConvergenceError(FlowbridgeError, RuntimeError):
    """An iterative method ended without reaching its tolerance; its result is withheld."""


class NonFiniteEnergyError(FlowbridgeError, ArithmeticError):
    """An energy or a force came out as NaN or infinite."""


class SingularMatrixError(FlowbridgeError, ArithmeticError):
    """A matrix that has to be inverted cannot be."""


class OverlapError(FlowbridgeError, RuntimeError):
    """Two states share too little of configuration space for a free energy between them."""


class MissingDependencyError(FlowbridgeError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""


class CompilationError(FlowbridgeError, RuntimeError):
    """A potential cannot be compiled on this machine; it still runs without."""


class WorkerError(FlowbridgeError, RuntimeError):
    """A worker process cannot do what it was started for."""
