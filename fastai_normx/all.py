from .warn import NormxWarning
from .stats import *
from .expected import *
from .normalize import *
from .match import *
from .activations import *
