"""What `from fastai_normx.all import *` adds after fastai's own import.

python benchmarks/import_time.py [RUNS]

Each run is a fresh process that times both imports; printed are the medians and the range."""
import platform, statistics, subprocess, sys
from importlib.metadata import version

code = '''
import time, warnings; warnings.filterwarnings('ignore')
t0 = time.perf_counter(); from fastai.vision.all import *
t1 = time.perf_counter(); from fastai_normx.all import *
print(t1-t0, time.perf_counter()-t1)'''

runs = [tuple(map(float, subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()))
        for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 7)]
for name, secs in zip(('fastai.vision.all', 'fastai_normx.all'), zip(*runs)):
    print(f'{name:20} median {statistics.median(secs):6.3f} s  (from {min(secs):.3f} to {max(secs):.3f}, {len(secs)} runs)')
print(f"ratio of medians: {statistics.median(b/a for a, b in runs):.2%}")
print(f"{platform.machine()}, Python {platform.python_version()}, " + ', '.join(f'{p} {version(p)}' for p in ('fastai', 'torch', 'fastcore')))
