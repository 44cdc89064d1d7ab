"""What `infer_normalization` costs on a batch of 64 images, 3x224x224.

python benchmarks/infer_speed.py [RUNS]

On one core: crops of scikit-learn's two photographs, normalized with ImageNet's constants, in three number formats and two memory
layouts, and the same values blurred by a float resize, which leave no lattice to find. Printed are the medians and the range."""
import os; os.environ.setdefault('OMP_NUM_THREADS', '1')
import platform, statistics, sys, time, warnings; warnings.filterwarnings('ignore')
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from fastai_normx.expected import expected_stats
from fastai_normx.infer import infer_normalization

torch.set_num_threads(1)
runs, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 21, np.random.default_rng(0)
ims = load_sample_images().images
crop = lambda im, i, j: im[i:i+224, j:j+224]
x = torch.tensor(np.stack([crop(ims[k % 2], rng.integers(200), rng.integers(400)) for k in range(64)])).permute(0, 3, 1, 2).contiguous()
mean, std = (torch.tensor(o).view(1, 3, 1, 1) for o in expected_stats('ResNet18_Weights.DEFAULT'))
x = (x/255 - mean)/std
batches = {'float32': x, 'float16': x.half(), 'bfloat16': x.bfloat16(), 'float32, channels last': x.contiguous(memory_format=torch.channels_last),
           'float32, a view on rows': F.pad(x, (5, 5))[..., 5:-5], 'float32, NaN in a column': x.clone().index_fill_(3, torch.tensor([0]), float('nan')),
           'float32, resized': F.interpolate(x, size=200, mode='bilinear', antialias=True), 'float16, resized': F.interpolate(x, size=200, mode='bilinear').half()}
for name, b in batches.items():
    r, secs = infer_normalization(b), []
    for _ in range(runs):
        t = time.perf_counter(); infer_normalization(b); secs.append((time.perf_counter()-t)*1e3)
    print(f'{name:24} median {statistics.median(secs):6.1f} ms  (from {min(secs):.1f} to {max(secs):.1f}, {runs} runs)  {r and r.source}')
print(f"{platform.machine()}, one thread, Python {platform.python_version()}, " + ', '.join(f'{p} {version(p)}' for p in ('torch', 'numpy', 'fastai')))
