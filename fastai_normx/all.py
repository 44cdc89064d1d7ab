from .warn import NormxWarning
from .stats import *
from .expected import *
from .pipeline import applied_stats
from .normalize import *
from .match import *
from .activations import *
