"""What `data_stats` costs, and how many images it needs.

    python benchmarks/data_stats.py [--data FOLDER] [--runs 7] [--images 128] [--files 1024] [--only loaders|tol|files]

Table 1: a full pass of `data_stats` against bare iteration of the same loader (for fastai: the same raw batches, without
augmentation and `Normalize`). Both run alternately in one process; the figure is the median over runs of the paired ratio.
Table 2: images read until every channel's mean and std is known to within .01 (95 %), from 10^4 and from 10^6 images that
are made up when they are read, each with its own brightness, contrast and tint.
Table 3: image files a second on one core and on two, to which the process and its workers are bound (Linux), against a plain loop
over Pillow and numpy, and one over torchvision.io. Pools of processes are started before the clock.
Table 4, on paper: how long that takes for ImageNet-21k and LAION-400M, if each worker reads as fast as one does in table 3, storage
keeps up, and images are as large as these; with tol=.01 the images that table 2 found are read.
Without --data the photographs are crops of scikit-learn's two sample images, saved as JPEG of 500 x 375 pixels.
PyTorch runs on one thread per process, so that its threads do not fight the loaders' workers for the cores and blur the comparison.
"""
import argparse, os, platform, statistics, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms as T

from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Normalize, RandomSplitter, Resize, aug_transforms, get_image_files, imagenet_stats
from fastai_normx.stats import ChannelStats, data_stats


def photographs(folder, n):
    "`n` JPEG crops, 500 x 375, of scikit-learn's two photographs"
    from sklearn.datasets import load_sample_images
    rng, ims = np.random.default_rng(0), load_sample_images().images
    for i in range(n):
        im = ims[i % 2]
        h, w = (int(s*rng.uniform(.5, 1)) for s in im.shape[:2])
        y, x = rng.integers(0, im.shape[0]-h+1), rng.integers(0, im.shape[1]-w+1)
        Image.fromarray(im[y:y+h, x:x+w]).resize((500, 375)).save(folder/f'{i:04}.jpg', quality=92)
    return folder


class Photos(Dataset):
    "JPEG files, resized and cropped to 224, as floats or as bytes"
    def __init__(self, files, last): self.files, self.tfm = files, T.Compose([T.Resize(256), T.CenterCrop(224), last])
    def __len__(self): return len(self.files)
    def __getitem__(self, i): return self.tfm(Image.open(self.files[i]).convert('RGB')), 0


class Synthetic(Dataset):
    "Image `i` has a brightness, contrast and tint of its own"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        x = rng.normal(.45, .15) + rng.normal(0, .05, (3, 1, 1)) + rng.uniform(.05, .3)*rng.standard_normal((3, 16, 16))
        return torch.from_numpy(x.clip(0, 1).astype(np.float32))


def loaders(files):
    "Name -> (object for `data_stats`, function that iterates the same batches)"
    for workers in (0, 2):
        for name, last in (('float32', T.ToTensor()), ('uint8', T.PILToTensor())):
            dl = DataLoader(Photos(files, last), 32, num_workers=workers)
            yield f'PyTorch, JPEG 224, {name}, {workers} workers', dl, lambda dl=dl: dl
        for name, tfms in (('', []), (', augmentation and Normalize', [*aug_transforms(), Normalize.from_stats(*imagenet_stats)])):
            dls = DataBlock((ImageBlock, CategoryBlock), get_y=lambda o: 0, splitter=RandomSplitter(.1, seed=0), item_tfms=Resize(224),
                            batch_tfms=tfms).dataloaders(files, bs=32, num_workers=workers, device='cpu')
            def bare(dl=dls.train): return dl.new(shuffle=False, drop_last=False, after_batch=[t for t in dl.after_batch.fs if not isinstance(t, Normalize)])
            yield f'fastai, JPEG 224{name}, {workers} workers', dls, bare
    x = torch.rand(256, 3, 224, 224)
    dl = DataLoader(TensorDataset(x), 32)
    yield 'PyTorch, float32 already in memory', dl, lambda: dl


def timed(f):
    t = time.perf_counter()
    f()
    return time.perf_counter()-t


def cost(data, bare, runs):
    "Medians of bare iteration, of `data_stats`, and of their paired ratio"
    def iterate():
        with getattr(getattr(data, 'train_ds', None), 'set_split_idx', lambda i: warnings.catch_warnings())(1):
            for b in bare(): pass
    def stats(): data_stats(data, progress=False)
    iterate(), stats()
    pairs = [(timed(iterate), timed(stats)) if i % 2 else (timed(stats), timed(iterate))[::-1] for i in range(runs)]  # who goes first alternates
    return [statistics.median(o) for o in zip(*((a, b, b/a-1) for a, b in pairs))]


def plain_loop(files):
    "What one writes without thinking: sums over Pillow's pixels"
    n, s, sq = 0, 0, 0
    for f in files:
        x = np.asarray(Image.open(f).convert('RGB'))/255
        n, s, sq = n+x.shape[0]*x.shape[1], s+x.sum((0, 1)), sq+(x**2).sum((0, 1))
    return n, s, sq


def torchvision_loop(files):
    "The same with torchvision.io and float32"
    from torchvision.io import ImageReadMode, decode_image
    n, s, sq = 0, 0, 0
    for f in files:
        x = decode_image(str(f), ImageReadMode.RGB).float()/255
        n, s, sq = n+x.shape[1]*x.shape[2], s+x.sum((1, 2)).double(), sq+(x**2).sum((1, 2)).double()
    return n, s, sq


@contextmanager
def cores(n):
    "This process, and those that it starts, on `n` cores"
    if not hasattr(os, 'sched_setaffinity'): yield; return
    was = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(was)[:n])
    try: yield
    finally: os.sched_setaffinity(0, was)


def readers(files, n):
    "Name -> (pool or None, function that reads all `files` with it) on `n` cores"
    parts = [files[i:i+64] for i in range(0, len(files), 64)]
    def split(loop): return lambda ex: list(ex.map(loop, parts)) if ex else loop(files)
    yield 'Pillow and numpy loop', n > 1, split(plain_loop)
    yield 'torchvision.io loop', n > 1, split(torchvision_loop)
    yield 'data_stats, threads', False, lambda ex: data_stats(files, progress=False)
    yield 'data_stats, processes', True, lambda ex: data_stats(files, executor=ex, progress=False)


def throughput(files, runs):
    "Name -> images a second on one core and on two"
    rates = {}
    for n in (1, 2):
        with cores(n):
            for name, pool, read in readers(files, n):
                with ProcessPoolExecutor(n) if pool else nullcontext() as ex:
                    if ex: read(ex)
                    rates.setdefault(name, []).append(len(files)/statistics.median(timed(lambda: read(ex)) for _ in range(runs)))
    return rates


def duration(seconds):
    "In the unit that reads best"
    for unit, size in (('days', 86400), ('h', 3600), ('min', 60)):
        if seconds >= 2*size: return f'{seconds/size:.1f} {unit}'
    return f'{seconds:.1f} s'


def on_paper(rate, n_tol):
    "Table 4, from images a second of one worker and the images that tol=.01 takes"
    workers = 1, 8, 64, 512
    print(f'\nOn paper, at {rate:.0f} images a second and worker:\n')
    print(f'| {"data":33} | ' + ' | '.join(f'{n:>4} workers' for n in workers) + f' |\n|{"-"*35}|' + '|'.join(['-'*14]*len(workers)) + '|')
    sizes = {'ImageNet-21k, 14.2 M images': 14_200_000, 'LAION-400M, 400 M images': 400_000_000, f'either, tol=.01: {n_tol:,} images': n_tol}
    for name, n in sizes.items():
        cells = [duration(n/rate/min(w, -(-n//64))) for w in workers]  # a part of 64 files is one worker's
        print(f'| {name:33} | ' + ' | '.join(f'{c:>12}' for c in cells) + ' |')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', type=Path, help='folder of images; default: crops of two photographs')
    p.add_argument('--runs', type=int, default=7)
    p.add_argument('--images', type=int, default=128, help='for table 1')
    p.add_argument('--files', type=int, default=1024, help='for table 3')
    p.add_argument('--only', choices=['loaders', 'tol', 'files'], help='tables 1, 2, or 3 and 4; default: all')
    a = p.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
          + ', '.join(f'{k} {version(k)}' for k in ('torch', 'torchvision', 'fastai', 'fastai_normx', 'pillow')))
    want = [a.only] if a.only else ['loaders', 'tol', 'files']
    with tempfile.TemporaryDirectory() as tmp:
        files = list(get_image_files(a.data or photographs(Path(tmp), max(a.images, a.files))))
        said = f"({'--data' if a.data else 'crops of two photographs'}), medians of {a.runs}"
        if 'loaders' in want: table_of_loaders(files[:a.images], a.runs, said)
        n_tol = table_of_tol() if 'tol' in want or 'files' in want else None
        if 'files' in want: table_of_files(files[:a.files], a.runs, said, n_tol)


def table_of_loaders(files, runs, said):
    "Table 1"
    print(f"\n{len(files)} images {said} paired runs\n")
    print(f'| {"loader":56} | bare, s | data_stats, s | difference |\n|{"-"*58}|---------|---------------|------------|')
    for name, data, bare in loaders(files):
        t0, t1, more = cost(data, bare, runs)
        print(f'| {name:56} | {t0:7.3f} | {t1:13.3f} | {more:+10.1%} |', flush=True)
    batch = torch.rand(64, 3, 224, 224)
    for o in (batch, (batch*255).byte()):
        ms = statistics.median(timed(lambda: ChannelStats.of(o)) for _ in range(9))*1000
        print(f'ChannelStats.of, 64x3x224x224 {o.dtype}: {ms:.1f} ms')


def table_of_tol():
    "Table 2; returns the most images that were read"
    print(f'\n| images in the dataset | read with tol=.01, three seeds | largest error of a mean or std |\n|{"-"*23}|{"-"*32}|{"-"*32}|')
    truth = ChannelStats.of(torch.stack([Synthetic(10**6)[i+10**7] for i in range(40_000)]))
    most = 0
    for n in (10**4, 10**6):
        ss = [data_stats(Synthetic(n), tol=.01, seed=s, progress=False) for s in range(3)]
        err = max((getattr(s, k)-getattr(truth, k)).abs().max().item() for s in ss for k in ('mean', 'std'))
        print(f'| {n:21,} | {", ".join(f"{len(s):,}" for s in ss):>30} | {err:30.4f} |')
        most = max(most, *map(len, ss))
    return most


def table_of_files(files, runs, said, n_tol):
    "Tables 3 and 4"
    print(f'\n{len(files)} files {said} runs, images a second\n')
    print(f'| {"":21} | 1 core | 2 cores |\n|{"-"*23}|--------|---------|')
    rates = throughput(files, runs)
    for name, (one, two) in rates.items(): print(f'| {name:21} | {one:6.0f} | {two:7.0f} |')
    on_paper(rates['data_stats, processes'][0], n_tol)


if __name__ == '__main__': main()
