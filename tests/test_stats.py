"float64 numpy is the judge: any split, order, dtype and layout gives its answer; margins hold what they promise."
import json, random, socket, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from fastai_normx.stats import ChannelStats, DataStatsWarning, data_stats, _min_items

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
    with pytest.raises(ValueError, match='none of the 1 image files; empty.jpg'): data_stats([path/'0'/'empty.jpg'], progress=False)
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
