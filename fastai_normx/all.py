from .expected import *
from .normalize import *
