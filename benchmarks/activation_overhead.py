"""What watching activations adds to a training step, in time and memory.

python benchmarks/activation_overhead.py [--device cpu] [--models resnet18,convnext_atto,...] [--rounds 9] [--json FILE]

Every way of watching trains the same model on the same batch, in fits of a few steps. In each round the ways come in another random
order, with a fit without watching before the first, between any two and after the last. A step is timed from the start of its batch to
the start of the next, so everything that happens in between counts; the first of each fit is left out. A way's figure is its fastest
step over the mean of the fastest of the two plain fits beside it, less one (what disturbs a step only adds to it): the median over
rounds, with quartiles. `not recorded` times only steps
that are not recorded. Memory is the most that was in use during a fit above what was in use before it, less the same for the plain
fits: of the process on Linux, of the GPU on CUDA. With --json the results are added to those that FILE has of other models and ways."""
import argparse, gc, json, os, platform, random, shutil, statistics, tempfile, time, warnings; warnings.filterwarnings('ignore')
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
p.add_argument('--rounds', type=int, default=9)
p.add_argument('--steps', type=int, default=4)
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
    "Its observer on all leaves, at every step; it writes its files at every step too"
    def __init__(self, **kw): self.kw = kw
    def before_fit(self):
        import torchinstruments as ti
        self.dir = tempfile.mkdtemp()
        ti.inject_observer(self.model, sampler=ti.AlwaysSampler(), selector=ti.leaf_modules(), output_dir=self.dir, **self.kw)
    def after_fit(self):
        import torchinstruments as ti
        ti.remove_observer(self.model); shutil.rmtree(self.dir)


ways = {'ActivationLogger()': lambda: ActivationLogger(valid=False),
        'ActivationLogger(hist=False)': lambda: ActivationLogger(valid=False, hist=False),
        'ActivationLogger(grads=True)': lambda: ActivationLogger(valid=False, grads=True),
        'ActivationLogger(every=10), not recorded': lambda: ActivationLogger(valid=False, every=10),
        'ActivationLogger(sample=None)': lambda: ActivationLogger(valid=False, sample=None),
        'ActivationLogger(sample=None, hist=False)': lambda: ActivationLogger(valid=False, sample=None, hist=False),
        'fastai ActivationStats()': lambda: ActivationStats(),
        'fastai ActivationStats(with_hist=True)': lambda: ActivationStats(with_hist=True)}
try: version('torchinstruments'); ways |= {'TorchInstruments': TorchInstruments, 'TorchInstruments, no histograms': lambda: TorchInstruments(histograms=())}
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


def fit(model, batch, cb):
    "Seconds of each step but the first, and bytes"
    learn = Learner(DataLoaders(Loader([batch]*args.steps), Loader()), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=1e-3, cbs=[Timer(), NoValid()])
    learn.logger = lambda *a: None
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    gc.collect()
    before = in_use(False)
    learn.fit(1, cbs=cb and cb())
    after = in_use(True)
    ts = learn.timer.ts
    return [b-a for a, b in zip(ts[1:-1], ts[2:])] if args.steps > 2 else [ts[2]-ts[1]], None if before is None else after-before


def q(v): return [round(o, 3) for o in (statistics.quantiles(v, n=4) if len(v) > 1 else v*3)]


about = dict(device=torch.cuda.get_device_name() if on_gpu else cpu_name(), threads=torch.get_num_threads(), cores=os.cpu_count(), clock='processor time' if args.cpu_time else 'wall time', rounds=args.rounds, steps=args.steps,
             python=platform.python_version(), **{k: version(k) for k in ('torch', 'fastai', 'torchvision', 'timm', *(['torchinstruments'] if 'TorchInstruments' in ways else []))})
print(', '.join(f'{k} {v}' for k, v in about.items()))
out = Path(args.json) if args.json else None
for name in args.models.split(','):
    model, batch = get_model(name)
    def run(way):
        secs, mem = fit(model, batch, ways.get(way))
        return min(secs), mem
    for k in ways: run(k)  # warm up
    plain, ratio, mem = [run(None)], {k: [] for k in ways}, {k: [] for k in ways}
    for r in range(args.rounds):
        for k in random.Random(r).sample(list(ways), len(ways)):
            t, m = run(k)
            plain.append(run(None))
            ratio[k].append(100*(2*t/(plain[-2][0]+plain[-1][0])-1)); mem[k].append(m)
    base, m0 = zip(*plain)
    print(f'\n{name}: {len([m for m in model.modules() if not list(m.children())])} leaf modules, plain step {statistics.median(base)*1e3:.1f} ms (quartiles {q(base)[0]*1e3:.1f} to {q(base)[2]*1e3:.1f})')
    res = json.loads(out.read_text()) if out and out.exists() else {}
    new = res.setdefault(name, dict(ways={})) | dict(plain_ms=q([s*1e3 for s in base]))
    for k in ways:
        pct, mb = q(ratio[k]), None if m0[0] is None else round((statistics.median(mem[k])-statistics.median(m0))/2**20, 1)
        new['ways'][k] = dict(percent=pct, mib=mb, about=about)
        print(f'  {k:42} {pct[1]:+7.1f} %  ({pct[0]:+.1f} to {pct[2]:+.1f})' + ('' if mb is None else f'  {mb:+8.1f} MiB'), flush=True)
    if out: out.write_text(json.dumps(res | {name: new}, indent=1))
