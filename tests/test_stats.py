"float64 numpy is the judge: any split, order, dtype and layout gives its answer; margins hold what they promise."
import collections, dataclasses, json, os, random, socket, subprocess, sys, threading, types, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from fastai_normx.stats import ChannelStats, DataStatsWarning, data_stats, _leaves, _min_items

fields = 'mean std within_std sem std_sem min max count nonfinite'.split()


def expected(images):
    "Every field by its definition, from a list of arrays [C,...] in float64"
    C, res = len(images[0]), {k: [] for k in fields}
    for c in range(C):
        ps = [np.asarray(im[c], dtype=np.float64).ravel() for im in images]
        bad = sum((~np.isfinite(p)).sum() for p in ps)
        ps = [p for p in (p[np.isfinite(p)] for p in ps) if len(p)]
        allp, k = np.concatenate(ps) if ps else np.array([]), len(ps)
        m, s = (allp.mean(), allp.std()) if k else (np.nan, np.nan)
        # influence of each image on the mean and the std of all pixels
        e_m = np.array([(p-m).sum() for p in ps])/max(1, len(allp))
        e_s = np.array([((p-m)**2-s**2).sum() for p in ps])/(2*s*len(allp)) if k and s > 0 else np.zeros(k)
        se = lambda e: np.sqrt((e**2).sum()*k/(k-1)) if k > 1 else np.inf
        vals = (m, s, np.mean([p.std() for p in ps]) if k else np.nan, se(e_m), se(e_s),
                allp.min() if k else np.nan, allp.max() if k else np.nan, len(allp), bad)
        for f, v in zip(fields, vals): res[f].append(v)
    return res


def check(stats, images, rtol=1e-6, only=fields):  # float32 pixels are summed in float32, 256 at a time
    assert len(stats) == len(images)
    spread = max(1e-12, *(float(np.abs(np.nan_to_num(expected(images)[k])).max()) for k in ('min', 'max')))
    for f in only: np.testing.assert_allclose(getattr(stats, f).numpy(), expected(images)[f], rtol=rtol, atol=max(rtol, 1e-7*(f == 'std_sem'))*spread, err_msg=f)  # std_sem: root of a difference


def same(a, b, rtol=1e-9):
    assert len(a) == len(b)
    for f in fields: np.testing.assert_allclose(getattr(a, f), getattr(b, f), rtol=rtol, atol=1e-12, err_msg=f)


batches = st.builds(lambda seed, n, c, size, dtype: (np.random.default_rng(seed), (n, c, *size), dtype), st.integers(0, 10**6), st.integers(1, 9),
                    st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=3), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8]))


def make(rng, shape, dtype, offset=0.):
    if dtype == torch.uint8: return torch.tensor(rng.integers(0, 256, shape, dtype=np.uint8))
    return torch.tensor(rng.normal(rng.normal(0, 1, (shape[0], shape[1], *[1]*(len(shape)-2))), .5, shape)+offset).to(dtype)


def tight(x): return 1e-9 if x.dtype in (torch.uint8, torch.float64) else 1e-6
def exact(x): return list(x.double().numpy()/(255 if x.dtype == torch.uint8 else 1))


# One batch

@given(batches)
@settings(max_examples=80, deadline=None)
def test_any_dtype_and_shape(b):
    x = make(*b)
    check(ChannelStats.of(x), exact(x), tight(x))


@given(batches, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_any_channel_axis_and_stride(b, dim):
    x = make(*b)
    dim = min(dim, x.ndim-1)
    moved = x.movedim(1, dim)
    check(ChannelStats.of(moved, dim), exact(x))
    check(ChannelStats.of(moved.contiguous(), dim-x.ndim), exact(x))
    check(ChannelStats.of(x.repeat_interleave(2, -1)[..., ::2]), exact(x))
    assert ChannelStats.of(x.numpy() if x.dtype != torch.bfloat16 else x) == ChannelStats.of(x)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_larger_images_and_channels_last(dtype):
    x = make(np.random.default_rng(0), (5, 3, 70, 65), dtype)
    for o in (x, x.to(memory_format=torch.channels_last), x.flip(2)[:, :, ::1]): check(ChannelStats.of(o), exact(x), tight(x))
    before = x.clone()
    ChannelStats.of(x)
    assert torch.equal(x, before)


def test_float64_input_is_not_changed():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    before = x.clone()
    ChannelStats.of(x)
    assert torch.equal(x, before)


def test_fp16_sums_do_not_overflow_and_large_offsets_keep_precision():
    x = torch.full((4, 1, 300, 300), 60000., dtype=torch.float16)
    assert ChannelStats.of(x).mean.item() == 60000 and ChannelStats.of(x).std.item() == 0
    y = make(np.random.default_rng(0), (6, 2, 50, 50), torch.float64, offset=1e6)
    check(ChannelStats.of(y), exact(y), rtol=1e-6)
    z = y.float()
    np.testing.assert_allclose(ChannelStats.of(z).std, z.double().numpy().std((0, 2, 3)), rtol=1e-5)
    c = torch.full((3, 1, 37, 41), .1)
    assert ChannelStats.of(c).std.item() == 0 and ChannelStats.of(c).mean.item() == c[0, 0, 0, 0].item()
    big = torch.tensor([1e30, -1e30]).view(1, 1, 1, 2)
    assert ChannelStats.of(big).std.item() == pytest.approx(1e30) and ChannelStats.of(big).nonfinite.item() == 0
    np.testing.assert_allclose(ChannelStats.of(y).std, y.numpy().std((0, 2, 3)), rtol=1e-9)


@given(batches, st.floats(0, 1), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_nonfinite_pixels_are_counted_and_left_out(b, share, value, seed):
    x = make(b[0], b[1], torch.float32)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share] = value
    a, b = ChannelStats.of(x[:1]), ChannelStats.of(x[1:])
    check(ChannelStats.of(x), exact(x), tight(x))
    check(a+b, exact(x))
    assert ChannelStats.from_json((a+b).to_json()) == a+b


@pytest.mark.filterwarnings('error')
def test_nothing_but_nan_inf_or_nothing_at_all():
    s = ChannelStats.of(torch.full((2, 3, 4, 4), torch.nan))
    assert s.mean.isnan().all() and s.min.isnan().all() and s.sem.isinf().all() and s.count.tolist() == [0]*3 and s.nonfinite.tolist() == [32]*3
    for empty in (torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 0)): assert len(ChannelStats.of(empty)) == 0 and ChannelStats.of(empty).count.tolist() == [0]*3
    assert json.loads(s.to_json())['items'] == 2 and 'NaN' not in s.to_json() and 'Inf' not in s.to_json()
    x = torch.rand(3, 3, 4, 4)
    check(s+ChannelStats.of(x), [np.full((3, 4, 4), np.nan)]*2+exact(x))


def test_one_pixel():
    s = ChannelStats.of(torch.tensor([[[[.25]]]]))
    assert (s.mean.item(), s.std.item(), s.within_std.item(), s.min.item(), s.max.item(), s.count.item()) == (.25, 0, 0, .25, .25, 1)
    assert s.sem.item() == np.inf and s.std_sem.item() == np.inf and s.margin().isinf().all()


def test_integers_are_pixels_in_0_255():
    u = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for t in (u, u.int(), u.long()): assert (ChannelStats.of(t).min.item(), ChannelStats.of(t).max.item()) == (0, 1)


# Merging

@given(batches, st.lists(st.integers(0, 9), max_size=4), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_split_and_order(b, cuts, rnd):
    x = make(*b)
    idx = list(range(len(x)))
    rnd.shuffle(idx)
    bounds = sorted({0, len(x), *(c for c in cuts if c < len(x))})
    parts = [ChannelStats.of(x[idx[i:j]]) for i, j in zip(bounds, bounds[1:])]
    check(sum(parts, ChannelStats()), exact(x), tight(x))
    rnd.shuffle(parts)
    left = parts[0]
    right = sum(parts[1:], ChannelStats())
    check(left+right, exact(x), tight(x))
    check(right+left, exact(x), tight(x))


@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_images_of_different_sizes(seed, sizes):
    rng = np.random.default_rng(seed)
    ims = [rng.normal(rng.normal(), 1, (2, *s)) for s in sizes]
    check(sum((ChannelStats.of(im[None]) for im in ims), ChannelStats()), ims)


def test_many_far_away_merges_stay_exact():
    x = np.random.default_rng(0).normal(1e4, 1, (2000, 1, 2, 2))
    check(sum((ChannelStats.of(o[None]) for o in x), ChannelStats()), list(x), rtol=1e-7)


def test_merge_refuses_other_things():
    with pytest.raises(ValueError, match='of 3 and of 2 channels'): ChannelStats.of(torch.rand(2, 3, 4, 4))+ChannelStats.of(torch.rand(2, 2, 4, 4))
    with pytest.raises(TypeError): ChannelStats()+1


# Shift, scale, save

@given(batches, st.floats(-3, 3), st.floats(.05, 20))
@settings(max_examples=60, deadline=None)
def test_affine_is_the_statistics_of_the_normalized_data(b, m, s):
    x = make(b[0], b[1], torch.float64)
    mean = torch.linspace(m, m+1, x.shape[1]).double()
    std = torch.linspace(s, s+1, x.shape[1]).double()
    y = (x-mean.view(-1, *[1]*(x.ndim-2)))/std.view(-1, *[1]*(x.ndim-2))
    a = ChannelStats.of(x).affine(mean, std)
    check(a, exact(y), rtol=1e-8)
    check(a+ChannelStats.of(y), exact(y)*2, rtol=1e-8)
    check(a.inverse(mean, std), exact(x), rtol=1e-8)


@given(batches)
@settings(max_examples=30, deadline=None)
def test_json_is_lossless(b):
    s = ChannelStats.of(make(*b))
    back = ChannelStats.from_json(json.dumps(json.loads(s.to_json())))
    assert back == s and back != s+s
    same(back, s, rtol=0)
    same(back+s, s+s, rtol=0)


def test_repr_names_what_matters():
    x = torch.rand(3, 12, 4, 4)
    x[0, 1, 0, 0] = np.nan
    r = repr(ChannelStats.of(x))
    assert '3 images, 12 channels' in r and 'nonfinite' in r and '...' in r
    assert 'nonfinite' not in repr(ChannelStats.of(x[1:]))


worker = '''
import sys, torch, torch.distributed as dist
from fastai_normx.stats import ChannelStats
rank, file, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group('gloo', init_method='tcp://127.0.0.1:'+port, rank=rank, world_size=2)
x = torch.load(file+'.pt')
s = ChannelStats.of(x[:3] if rank==0 else x[3:]).all_reduce()
open(f'{file}.{rank}', 'w').write(s.to_json())
dist.barrier()
dist.destroy_process_group()
'''


def test_all_reduce_over_two_processes(tmp_path):
    x, f = torch.rand(10, 3, 8, 8), tmp_path/'store'
    torch.save(x, f'{f}.pt')
    with socket.create_server(('127.0.0.1', 0)) as free: port = str(free.getsockname()[1])
    ps = [subprocess.Popen([sys.executable, '-c', worker, str(r), str(f), port]) for r in range(2)]
    try: assert [p.wait(timeout=120) for p in ps] == [0, 0]
    finally: [p.kill() for p in ps]
    a, b = (ChannelStats.from_json(Path(f'{f}.{r}').read_text()) for r in range(2))
    assert a == b
    check(a, exact(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.uint8, torch.float16, torch.float32])
def test_gpu(dtype):
    x = make(np.random.default_rng(0), (9, 3, 60, 60), dtype)
    torch.cuda.set_sync_debug_mode('error')
    try: parts = [ChannelStats.of(o) for o in x.cuda().split(4)]; s = sum(parts, ChannelStats())
    finally: torch.cuda.set_sync_debug_mode('default')
    check(s, exact(x))
    check(s+ChannelStats.of(x), exact(x)*2)
    check(s.affine([.5]*3, [.5]*3).inverse([.5]*3, [.5]*3), exact(x))


# Sources

@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    ims = []
    for i in range(70):
        (tmp_path/f'{i%2}').mkdir(exist_ok=True)
        ims.append(rng.integers(0, 256, (8+i % 5, 9, 3), dtype=np.uint8)//(1+i % 2))
        Image.fromarray(ims[-1]).save(tmp_path/f'{i%2}'/f'{i:02}.png')
    return tmp_path, ims


def chw(ims): return [im.transpose(2, 0, 1)/255 for im in ims]


@pytest.mark.filterwarnings('error')
def test_folder_and_file_list(folder):
    path, ims = folder
    files = sorted(path.rglob('*.png'), key=lambda p: p.name)
    for src in (path, str(path), files, [str(f) for f in files], tuple(files)): check(data_stats(src, progress=False), chw(ims), 1e-9)
    check(data_stats(files[3], progress=False), chw(ims[3:4]))
    grey = [np.asarray(Image.fromarray(im).convert('L'))[None]/255 for im in ims]
    check(data_stats(path, mode='L', progress=False), grey)


def test_broken_files_are_named_and_counted(folder):
    path, ims = folder
    (path/'0'/'empty.jpg').touch()
    whole = (path/'0'/'00.png').read_bytes()
    (path/'1'/'cut.png').write_bytes(whole[:len(whole)//2])
    with pytest.warns(DataStatsWarning, match='2 of 72 image files') as ws: s = data_stats(path, progress=False)
    assert len(ws) == 1 and 'empty.jpg' in str(ws[0].message) and 'cut.png' in str(ws[0].message) and ws[0].filename == __file__
    check(s, chw(ims))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(data_stats(path, n_items=30, progress=False)) == 30
        assert len(data_stats(path, n_items=70, progress=False)) == 70
    with pytest.raises(ValueError, match='none of the 1 image files; .*empty.jpg'): data_stats([path/'0'/'empty.jpg'], progress=False)
    with pytest.raises(ValueError, match='`mode`'): data_stats(path, mode='F', progress=False)
    with pytest.raises(ValueError, match='`mode`'): data_stats(path, mode='XYZ', progress=False)


def test_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match='found no image files'): data_stats(tmp_path)
    with pytest.raises(ValueError, match='does not exist'): data_stats(tmp_path/'nowhere')


@pytest.mark.parametrize('num_workers', [0, 1])
def test_torch_loaders(num_workers):
    x = torch.rand(50, 3, 6, 6)
    ds = TensorDataset(x, torch.zeros(50))
    check(data_stats(DataLoader(ds, 8, shuffle=True, num_workers=num_workers), progress=False), exact(x))
    sub = DataLoader(ds, 8, sampler=SubsetRandomSampler(range(10, 30)), num_workers=num_workers)
    check(data_stats(sub, progress=False), exact(x[10:30]))
    few = data_stats(sub, n_items=20, progress=False)
    check(few, exact(x[10:30]))
    a, b, c = (data_stats(DataLoader(ds, 8, num_workers=num_workers), n_items=11, seed=s, progress=False) for s in (1, 1, 2))
    assert a == b and a != c and len(a) == 11 and a != ChannelStats.of(x[:11])
    check(data_stats(ds, progress=False), exact(x))
    assert len(data_stats(DataLoader(ds, batch_sampler=[[1, 2], [3]]), n_items=2, progress=False)) == 2
    check(data_stats(DataLoader(ds, batch_size=None, sampler=[[1, 2], [3]]), progress=False), exact(x[1:4]))


class Stream(IterableDataset):
    def __init__(self, x): self.x = x
    def __iter__(self): return iter(self.x)


def test_streams_and_nested_batches():
    x, g = torch.rand(40, 3, 6, 6), torch.rand(40, 6)
    for src in (DataLoader(Stream(x), 8), [x[:8], x[8:]], iter([x]), [(x, g)], [{'label': g.argmax(1), 'more': [g, {'image': x}]}], x, x.numpy(), [x.numpy()]):
        check(data_stats(src, progress=False), exact(x))
    check(data_stats(iter([x[:16], x[16:32], x[32:]]), n_items=20, progress=False), exact(x[:20]))
    check(data_stats([x.movedim(1, -1)], dim=-1, progress=False), exact(x))
    gen = iter([x, x[:5]])
    data_stats(gen, n_items=40, progress=False)
    assert len(next(gen)) == 5
    with pytest.raises(ValueError, match=r'no images in a batch.*int64'): data_stats([torch.arange(3)], progress=False)
    for odd in (3, None, {'a': x}):
        with pytest.raises(ValueError, match='cannot read'): data_stats(odd)


def test_progress_bar_can_be_switched_off(capsys):
    data_stats([torch.rand(4, 3, 6, 6)]*3, progress=False)
    assert capsys.readouterr().out == ''
    data_stats([torch.rand(4, 3, 6, 6)]*3)
    data_stats((o for o in [torch.rand(4, 3, 6, 6)]*3), n_items=6)
    assert '100.00% [3/3' in capsys.readouterr().out


@pytest.fixture
def tile_dls():
    "A function that makes `DataLoaders` of tiles of scikit-learn's two sample photographs"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, RandomSplitter
    from sklearn.datasets import load_sample_images
    tiles = [im[i:i+64, j:j+64] for im in load_sample_images().images for i in range(0, 384, 128) for j in range(0, 576, 128)]
    def make(*tfms, **kw):
        db = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: tiles[i], get_y=lambda i: i < len(tiles)//2, splitter=RandomSplitter(.3, seed=1), batch_tfms=list(tfms), **kw)
        return db.dataloaders(list(range(len(tiles))), bs=4, num_workers=0)
    return make


def test_fastai_loaders_give_each_raw_pixel_once(tile_dls):
    from fastai.vision.all import Normalize, PILImage, Resize, ResizeMethod, ToTensor, aug_transforms, imagenet_stats
    norm = Normalize.from_stats(*imagenet_stats, cuda=False)
    for item_tfms, batch_tfms in ((None, []), (None, [*aug_transforms(max_rotate=90), norm]), (Resize(64, 'crop'), [norm])):
        dls = tile_dls(*batch_tfms, item_tfms=item_tfms)
        own = [np.asarray(dls.train_ds[i][0]).transpose(2, 0, 1)/255 for i in range(len(dls.train_ds))]
        for src in (dls, dls.train): check(data_stats(src, progress=False), own, rtol=1e-6)  # float32 pixels
        assert dls.train_ds.split_idx == 0 and dls.train.shuffle and any(t is norm for t in dls.train.after_batch.fs) == (norm in batch_tfms)
        check(data_stats(dls, n_items=len(own), progress=False), own, rtol=1e-6)
        assert data_stats(dls, n_items=5, seed=3, progress=False) == data_stats(dls, n_items=5, seed=3, progress=False) != data_stats(dls, n_items=5, progress=False)
    valid = [np.asarray(dls.valid_ds[i][0]).transpose(2, 0, 1)/255 for i in range(len(dls.valid_ds))]
    check(data_stats(dls.valid, progress=False), valid)
    check(data_stats(dls.valid, raw=False, progress=False).inverse(*imagenet_stats), valid, rtol=1e-5, only=['mean', 'std', 'sem', 'min', 'max', 'count'])


def test_learner_is_left_ready_to_train_when_a_batch_breaks(tile_dls):
    from fastai.vision.all import Learner, Transform, TensorImage, nn
    class Breaks(Transform):
        def encodes(self, x:TensorImage): raise RuntimeError('broken transform')
    dls = tile_dls()
    learn = Learner(dls, nn.Identity(), loss_func=nn.MSELoss())
    assert data_stats(learn, progress=False) == data_stats(dls, progress=False)
    dls.train.after_batch.add(Breaks())
    with pytest.raises(RuntimeError, match='broken transform') as e: data_stats(learn, progress=False)
    assert dls.train_ds.split_idx == 0
    class NoImage(Transform):
        order = -1
        def encodes(self, x:TensorImage): return x.long()
    dls = tile_dls()
    dls.train.after_batch.fs = [NoImage()]
    with pytest.raises(ValueError, match='no images in a batch') as e: data_stats(dls, progress=False)
    assert dls.train_ds.split_idx == 0 and e.value.__traceback__ is not None  # even while the traceback keeps our frames


# The promise of tol

def population(kind, n, rng):
    "Per-image mean and contrast, of clearly different shapes"
    if kind == 'normal': return rng.normal(.45, .15, n), rng.uniform(.05, .3, n)
    if kind == 'skewed': return .05+rng.exponential(.12, n), rng.exponential(.1, n)
    return np.where(rng.random(n) < .2, .8, .2), np.where(rng.random(n) < .2, .02, .25)  # two kinds of images


def sample(kind, n, rng):
    m, s = population(kind, n, rng)
    return torch.tensor(m[:, None, None]+s[:, None, None]*np.array([-1., 1.])).unsqueeze(2).reshape(n, 1, 2)


@pytest.mark.parametrize('confidence', [.8, .95])
@pytest.mark.parametrize('kind', ['normal', 'skewed', 'two kinds'])
def test_stopping_at_tol_covers_the_truth(kind, confidence):
    rng, runs = np.random.default_rng(0), 150
    big = sample(kind, 400_000, rng).numpy()
    mean, std, tol, hits, ns = big.mean(), big.std(), .016, 0, []
    for _ in range(runs):
        stream = (sample(kind, 32, rng) for _ in range(10**4))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', DataStatsWarning)
            s = data_stats(stream, tol=tol, confidence=confidence, progress=False)
        hits += abs(s.mean.item()-mean) <= tol and abs(s.std.item()-std) <= tol
        ns.append(len(s))
    assert 256 == _min_items <= min(ns) and np.median(ns) < 5000
    assert hits/runs >= confidence - 2*(confidence*(1-confidence)/runs)**.5


def test_margin_covers_at_every_sample_size():
    rng = np.random.default_rng(1)
    big = sample('normal', 400_000, rng).numpy()
    for n, least in ((8, .88), (64, .92)):
        hits = 0
        for _ in range(400):
            s = ChannelStats.of(sample('normal', n, rng))
            hits += bool(((torch.stack([s.mean, s.std])-torch.tensor([[big.mean()], [big.std()]])).abs() <= s.margin()).all())
        assert hits/400 > least
        assert hits/400 < .995


def test_tol_takes_a_random_order_or_says_that_it_cannot(recwarn):
    bright = torch.cat([torch.rand(2000, 3, 4, 4)*.1, torch.rand(2000, 3, 4, 4)*.1+.9])
    s = data_stats(DataLoader(TensorDataset(bright), 64), tol=.05, progress=False)
    assert len(s) < 2500 and (s.mean-bright.mean((0, 2, 3))).abs().max() < .05 and not recwarn.list
    with pytest.warns(DataStatsWarning, match='only if that order is random'): s = data_stats(bright.split(64), tol=.05, progress=False)
    assert s.mean.max() < .1
    data_stats(bright.split(64), tol=1e-9, progress=False)  # read to the end: nothing to warn about
    with pytest.warns(DataStatsWarning, match='n_items=300 images were read before tol=1e-05'): data_stats(DataLoader(TensorDataset(bright), 64), 300, tol=1e-5, progress=False)


def test_images_needed_do_not_depend_on_the_dataset():
    class Lazy(torch.utils.data.Dataset):
        def __init__(self, n): self.n = n
        def __len__(self): return self.n
        def __getitem__(self, i): r = random.Random(i); return torch.full((3, 2, 2), r.gauss(.5, .2))+torch.tensor([-.1, .1])*r.random()
    ns = [len(data_stats(Lazy(n), tol=.02, seed=s, progress=False)) for n in (10**4, 10**6) for s in range(3)]
    assert max(ns) <= 1.25*min(ns) and max(ns) < 2000


# Containers

class Tensors:
    "Like TensorDict: no mapping by type, only by its methods"
    def __init__(self, **kw): self._d = kw
    def keys(self): return self._d.keys()
    def values(self): return self._d.values()
    def items(self): return self._d.items()


@dataclasses.dataclass
class Batch:
    label: object
    image: object


def batch_feature(x):
    from transformers import BatchFeature
    return BatchFeature(dict(labels=[1]*len(x), pixel_values=x))


def model_output(x):
    from transformers.modeling_outputs import BaseModelOutputWithNoAttention
    return BaseModelOutputWithNoAttention(last_hidden_state=x)


pair = collections.namedtuple('Pair', 'label image')
containers = {'UserDict': lambda x: collections.UserDict(label=1, image=x), 'BatchFeature': batch_feature, 'ModelOutput': model_output, 'mappingproxy': lambda x: types.MappingProxyType(dict(a=None, b=x)),
    'TensorDict-like': lambda x: Tensors(y=torch.arange(3), image=x), 'nested': lambda x: Tensors(y='cat', inner=Tensors(image=x)), 'dataclass': lambda x: Batch(torch.arange(3), x),
    'namedtuple': lambda x: pair(0, x), 'list of dicts': lambda x: [dict(label=1), dict(image=x)], 'dict of dataclasses': lambda x: dict(a=Batch('cat', [x])), 'L': lambda x: L(x, torch.arange(3))}


@pytest.mark.parametrize('make', containers.values(), ids=containers)
def test_images_in_any_container(make):
    x = torch.rand(6, 3, 8, 8)
    check(data_stats([make(x)], progress=False), exact(x))
    check(data_stats(DataLoader([0, 1], batch_size=1, collate_fn=lambda b: make(x[b[0]*3:b[0]*3+3])), progress=False), exact(x))
    with pytest.raises(ValueError, match='no images in a batch'): data_stats([make(torch.arange(3))], progress=False)


@pytest.mark.parametrize('make', [collections.UserDict, Tensors, lambda **kw: batch_feature(kw['image'])])
def test_one_batch_that_is_a_mapping_is_refused(make):
    with pytest.raises(ValueError, match=r'for one batch pass `\[batch\]`'): data_stats(make(image=torch.rand(2, 3, 4, 4)))


def test_real_tensordict():
    TensorDict = pytest.importorskip('tensordict').TensorDict
    x = torch.rand(6, 3, 8, 8)
    check(data_stats([TensorDict(dict(y=torch.arange(6), inner=dict(image=x)), batch_size=[6])], progress=False), exact(x))


def test_what_only_looks_like_a_container():
    import pandas as pd
    for o in (Batch, pd.DataFrame({'a': [1, 2]}), pd.Series([1.]), 'text', b'bytes', 3, None, {1, 2}, object()): assert _leaves(o) == []


# Arrays as they come

@pytest.mark.parametrize('dtype', [np.uint8, np.float32, np.float64])
def test_arrays_that_run_backwards(dtype):
    x = (np.random.default_rng(0).random((4, 5, 6, 3))*255).astype(dtype)
    for o in (x[::-1], x[:, ::-1], x[..., ::-1], x[:, ::-1, ::-2], np.flip(x)):
        check(ChannelStats.of(o, dim=-1), [im.astype(np.float64).transpose(2, 0, 1)/(255 if dtype == np.uint8 else 1) for im in o], 1e-6)
        assert data_stats([o], dim=-1, progress=False) == ChannelStats.of(o.copy(), dim=-1)


def test_arrays_of_the_other_byte_order():
    x = np.random.default_rng(0).random((4, 3, 6, 6))
    for t in ('>f4', '>f8', '>f2'): assert ChannelStats.of(x.astype(t)) == ChannelStats.of(x.astype(t[1:]))


def test_sum_needs_no_start():
    parts = [ChannelStats.of(torch.rand(3, 3, 4, 4)) for _ in range(3)]
    assert sum(parts) == sum(parts, ChannelStats()) and sum(parts[:1]) is parts[0]
    for o in (1, 0., None, 'a'):
        with pytest.raises(TypeError): o+parts[0]


@given(st.floats(150, 300), st.integers(1, 4), st.sampled_from([1, -1]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_squares_that_overflow_give_error_bars_of_inf(power, n, sign, seed):
    x = np.random.default_rng(seed).uniform(.5, 1, (n, 2, 4, 4))*sign*10**power
    x[:, 1] = np.random.default_rng(seed).random((n, 4, 4))
    parts = [ChannelStats.of(x[i:i+1]) for i in range(n)]
    for s in (ChannelStats.of(x), sum(parts), sum(parts)+ChannelStats.of(x[:1]*0+1e-3), ChannelStats.from_json(sum(parts).to_json())):
        for f in fields: assert not getattr(s, f).isnan().any(), f
        assert not s.margin().isnan().any() and not s.affine(.5, .5).sem.isnan().any() and not s.affine(.5, .5).std_sem.isnan().any()
        assert power < 155 or s.sem[0].isinf() and s.std_sem[0].isinf()
    np.testing.assert_allclose(ChannelStats.of(x).mean, x.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(sum(parts).mean, x.mean((0, 2, 3)), rtol=1e-12)
    check(ChannelStats.of(x[:, 1:]), [im[1:] for im in x])
    assert sum(parts) == ChannelStats.from_json(sum(parts).to_json())


def test_sums_that_overflow_have_a_mean():
    x = torch.full((2, 1, 30, 30), 1.5e308, dtype=torch.float64)
    assert ChannelStats.of(x).mean.item() == pytest.approx(1.5e308) and ChannelStats.of(x).std.item() == 0
    x[1] /= 3
    assert ChannelStats.of(x).mean.item() == pytest.approx(1e308) and ChannelStats.of(x).std_sem.item() == np.inf


# Files

def test_one_colour_and_empty_files(tmp_path):
    Image.new('RGB', (8, 6), (255, 0, 51)).save(tmp_path/'a.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = data_stats(tmp_path, progress=False)
        check(s, [np.broadcast_to(np.array([1., 0, .2])[:, None, None], (3, 6, 8))], 1e-12)
        Image.new('RGB', (8, 6), (255, 0, 51)).save(tmp_path/'b.png')
        s = data_stats(tmp_path, progress=False)
        assert s.within_std.tolist() == [0]*3 and max(s.sem.max(), s.std_sem.max(), s.std.max()) < 1e-15
    (tmp_path/'c.png').touch()
    with pytest.warns(DataStatsWarning, match=r'1 of 3 image files could not be read .*/c.png \(UnidentifiedImageError\)'): assert data_stats(tmp_path, progress=False) == s


@pytest.mark.filterwarnings('error')
def test_a_link_to_itself_counts_a_photo_once(folder):
    path, ims = folder
    (path/'0'/'loop').symlink_to(path, target_is_directory=True)
    (path/'again.png').symlink_to(path/'0'/'00.png')
    check(data_stats(path, progress=False), chw(ims), 1e-9)


def test_pipes_do_not_hang_and_broken_links_are_reported(folder):
    path, ims = folder
    os.mkfifo(path/'pipe.png')
    (path/'gone.png').symlink_to(path/'nowhere.png')
    heard = []
    def read():
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            heard.append(data_stats(path, progress=False))
        heard.extend(str(w.message) for w in ws if w.category is DataStatsWarning)
    t = threading.Thread(target=read, daemon=True)
    t.start()
    t.join(60)
    check(heard[0], chw(ims))
    assert len(heard) == 2 and '2 of 72 image files could not be read' in heard[1] and 'pipe.png (OSError)' in heard[1] and 'gone.png (FileNotFoundError)' in heard[1]
    with pytest.raises(ValueError, match='none of the 1 image files; .*pipe.png.: not a regular file'): data_stats([path/'pipe.png'], progress=False)


@pytest.fixture
def deep_folder(tmp_path):
    for i in range(20): Image.fromarray((np.arange(4096).reshape(64, 64)//(1+i % 3)).astype(np.uint16)).save(tmp_path/f'{"ab"[i % 2]}_{i:02}.png')
    return tmp_path


def deep_block(path, **kw):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, IndexSplitter, get_image_files
    return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda f: f.name[0], splitter=IndexSplitter([0]), **kw).dataloaders(path, bs=4, num_workers=0)


def test_more_than_8_bits_is_said_once_by_files_and_loaders(deep_folder):
    from fastai.vision.all import Learner
    from torchvision.datasets import ImageFolder
    (deep_folder.parent/'top').mkdir(exist_ok=True)
    (deep_folder.parent/'top'/'class').symlink_to(deep_folder, target_is_directory=True)
    as_tensor = lambda im: torch.tensor(np.array(im)).permute(2, 0, 1)/255
    dls = deep_block(deep_folder)
    top = {1: '1,365'}  # of the one file in the validation set
    sources = [(deep_folder, 20), (sorted(deep_folder.glob('*.png')), 20), (dls, 19), (dls.train, 19), (dls.valid, 1), (Learner(dls, torch.nn.Identity(), loss_func=lambda *a: 0), 19),
               (DataLoader(ImageFolder(deep_folder.parent/'top', as_tensor), 4), 20)]
    for data, n in sources:
        with pytest.warns(DataStatsWarning) as ws: s = data_stats(data, progress=False)
        said, = [str(w.message) for w in ws if w.category is DataStatsWarning]
        assert said.startswith(f'{n} of {n} image files hold more than 8 bits: their greatest value is {top.get(n, "4,095")}, so 12 bits.') and s.mean.min() > .9
        assert len(said.split('\n')[0].split()) <= 40
        scope = {}
        exec(said.partition('\n')[2], scope)
    with warnings.catch_warnings():
        warnings.simplefilter('error', DataStatsWarning)
        s = data_stats(deep_block(deep_folder, get_x=scope['open_deep']), progress=False)
    files = [f for f in dls.train.items]
    want = np.stack([np.asarray(Image.open(f)).astype(np.float64)/4095 for f in files])
    np.testing.assert_allclose(s.mean, [want.mean()]*3, atol=.1/255)
    np.testing.assert_allclose(s.std, [want.std()]*3, atol=.1/255)


def test_every_file_that_was_read_counts(deep_folder):
    for i in range(300): Image.new('L', (4, 4), i % 255).save(deep_folder/f'c_{i}.png')
    with pytest.warns(DataStatsWarning, match='^20 of 320 image files hold more than 8 bits'): data_stats(deep_folder, progress=False)
    (deep_folder/'d.png').touch()
    with pytest.warns(DataStatsWarning, match='1 of 321 image files could not be read .* 20 of 320 image files') as ws: data_stats(deep_folder, progress=False)
    assert len(ws) == 1
