"What the benchmarks say of the machine they ran on: no host name, no path"
import platform
from pathlib import Path


def cpu_name():
    "Model of the processor"
    try: return next(l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()
