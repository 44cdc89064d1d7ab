"""What watching activations adds to a training step, in time and memory.

python benchmarks/activation_overhead.py [--device cpu] [--models resnet18,convnext_atto,...] [--steps 60] [--json FILE]

Each way of watching trains a model on one batch, in a fit of its own, and looks at every second step; hooks are on in those steps only.
A step is timed from the start of its batch to the start of the next, so everything that happens in between counts. A way's figure is a
step that was looked at over the mean of the two beside it that were not, less one: the median over all of them but the first two, with
quartiles. Memory is the most that was in use during a fit above what was in use before it, less the same for a fit without a
callback: of the process on Linux, of the GPU on CUDA. With --json the results are added to those that FILE has of other models and ways."""
import argparse, gc, json, os, platform, shutil, statistics, tempfile, time, warnings; warnings.filterwarnings('ignore')
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from fastai.basics import CancelValidException, Callback, DataLoaders, Learner, SGD
from fastai.callback.hook import ActivationStats
from fastai_normx.activations import ActivationLogger
from machine import cpu_name

p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
p.add_argument('--models', default='resnet18,resnet50,convnext_atto,vit_tiny')
p.add_argument('--ways', default='', help='only ways whose name contains one of these, comma-separated')
p.add_argument('--steps', type=int, default=60)
p.add_argument('--threads', type=int, default=0, help='0: as torch chooses')
p.add_argument('--cpu-time', action='store_true', help='count the time that the processor worked for us, for a machine that others use too')
p.add_argument('--json')
args = p.parse_args()
if args.threads: torch.set_num_threads(args.threads)
clock = time.process_time if args.cpu_time else time.perf_counter
dev, on_gpu = torch.device(args.device), args.device.startswith('cuda')


def sync():
    if on_gpu: torch.cuda.synchronize()


class Loader(list):
    n_inp, device = 1, dev


class Timer(Callback):
    order = -100
    def before_fit(self): self.ts = []
    def before_batch(self): sync(); self.ts.append(clock())
    def after_fit(self): sync(); self.ts.append(clock())


class NoValid(Callback):
    def before_validate(self): raise CancelValidException


class TorchInstruments(Callback):
    "Its observer on all leaves; it writes its files whenever it looks"
    def __init__(self, **kw): self.kw = kw
    def before_fit(self):
        import torchinstruments as ti
        self.dir = tempfile.mkdtemp()
        ti.inject_observer(self.model, sampler=ti.EveryNForwardsSampler(2), selector=ti.leaf_modules(), output_dir=self.dir, **self.kw)
    def after_fit(self):
        import torchinstruments as ti
        ti.remove_observer(self.model); shutil.rmtree(self.dir)


def logger(**kw): return lambda: ActivationLogger(every=2, valid=False, **kw)
ways = {'ActivationLogger()': logger(),
        'ActivationLogger(hist=False)': logger(hist=False),
        'ActivationLogger(grads=True)': logger(grads=True),
        'ActivationLogger(sample=None)': logger(sample=None),
        'ActivationLogger(sample=None, hist=False)': logger(sample=None, hist=False),
        'fastai ActivationStats()': lambda: ActivationStats(every=2),
        'fastai ActivationStats(with_hist=True)': lambda: ActivationStats(every=2, with_hist=True)}
try: version('torchinstruments'); ways |= {'TorchInstruments': TorchInstruments, 'TorchInstruments, one histogram': lambda: TorchInstruments(max_histogram_modules=1)}
except Exception: print('TorchInstruments is not installed: left out')
if args.ways: ways = {k: v for k, v in ways.items() if any(w in k for w in args.ways.split(','))}


def get_model(name):
    "The model, and a batch of 16 images of 128 pixels for it"
    torch.manual_seed(0)
    if name.startswith('resnet'):
        from torchvision import models
        m = getattr(models, name)(num_classes=10)
    else:
        import timm
        m = timm.create_model(dict(vit_tiny='vit_tiny_patch16_224').get(name, name), num_classes=10, **(dict(img_size=128) if 'vit' in name else {}))
    return m.to(dev), (torch.randn(16, 3, 128, 128, device=dev), torch.arange(16, device=dev) % 10)


def in_use(peak):
    "Bytes in use now, or at most since the last look at the present; None where that cannot be read"
    if on_gpu: return torch.cuda.max_memory_allocated() if peak else (torch.cuda.reset_peak_memory_stats(), torch.cuda.memory_allocated())[1]
    try:
        if not peak: Path('/proc/self/clear_refs').write_text('5')
        return int(Path('/proc/self/status').read_text().split('VmHWM:' if peak else 'VmRSS:')[1].split()[0])*1024
    except OSError: return None


def fit(model, batch, cb=None):
    "Seconds of each step but the last, and bytes"
    learn = Learner(DataLoaders(Loader([batch]*args.steps), Loader()), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=1e-3, cbs=[Timer(), NoValid()])
    learn.logger = lambda *a: None
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    gc.collect()
    before = in_use(False)
    learn.fit(1, cbs=cb and cb())
    after, ts = in_use(True), learn.timer.ts
    return [b-a for a, b in zip(ts, ts[1:-1])], None if before is None else after-before


def q(v): return [round(o, 3) for o in statistics.quantiles(v, n=4)]
def show(v): return f'{v[1]:+7.1f} %  ({v[0]:+.1f} to {v[2]:+.1f})'


about = dict(device=torch.cuda.get_device_name() if on_gpu else cpu_name(), threads=torch.get_num_threads(), cores=os.cpu_count(), clock='processor time' if args.cpu_time else 'wall time', steps=args.steps,
             python=platform.python_version(), **{k: version(k) for k in ('torch', 'fastai', 'torchvision', 'timm', *(['torchinstruments'] if 'TorchInstruments' in ways else []))})
print(', '.join(f'{k} {v}' for k, v in about.items()))
out = Path(args.json) if args.json else None
for name in args.models.split(','):
    model, batch = get_model(name)
    got = {k: fit(model, batch, ways.get(k)) for k in ('warm up', 'plain', *ways)}
    plain, m0 = got['plain'][0][1:], got['plain'][1]
    print(f'\n{name}: {len([m for m in model.modules() if not list(m.children())])} leaf modules, plain step {statistics.median(plain)*1e3:.1f} ms')
    res = json.loads(out.read_text()) if out and out.exists() else {}
    new = res.setdefault(name, dict(ways={})) | dict(plain_ms=q([s*1e3 for s in plain]))
    for k in ways:
        d, m = got[k]
        odd = k.startswith('Torch')  # looks at the second step, the fourth, ...; the others at the first, the third, ...
        pct = q([100*(2*d[i]/(d[i-1]+d[i+1])-1) for i in range(4+odd, len(d)-1, 2)])
        mb = None if m is None else round((m-m0)/2**20, 1)
        new['ways'][k] = dict(percent=pct, mib=mb, about=about)
        print(f'  {k:42} {show(pct)}' + ('' if mb is None else f'  {mb:+8.1f} MiB'), flush=True)
    if out: out.write_text(json.dumps(res | {name: new}, indent=1))
