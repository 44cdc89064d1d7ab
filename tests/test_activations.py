"ActivationLogger where a reader would be bored: every way in which monitors break, exits, exactness, bias, memory, sinks."
import copy, dataclasses, gc, math, pickle, threading, warnings, weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

warnings.filterwarnings('ignore', category=FutureWarning)
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException, DataLoaders,
                           Learner)
from fastai.callback.schedule import *
from fastai.torch_core import set_seed
from fastai.data.load import DataLoader
from fastai_normx import activations as A
from fastai_normx.activations import ActivationLogger, ActivationLoggerWarning, ActivationRecorder, ActivationWarning

pytestmark = pytest.mark.filterwarnings('error::fastai_normx.activations.ActivationLoggerWarning', 'error::fastai_normx.activations.ActivationWarning')
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
stats = ('mean', 'std', 'min', 'max', 'near_zero', 'nonfinite')


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def get_learner(model=None, *, cbs=None, n=48, bs=8, size=16, loss=None, x=None, **kw):
    torch.manual_seed(0)
    x = torch.randn(n, 3, size, size) if x is None else x
    y = torch.arange(n) % 2
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=bs, shuffle=True), DataLoader(ds[:2*bs], bs=bs))
    learn = Learner(dls, model or small(), loss_func=loss or nn.CrossEntropyLoss(), cbs=cbs, **kw)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    learn.logger = lambda *a: None
    return learn


def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def is_clean(learn):
    al = learn.activation_logger
    assert n_hooks(learn.model) == 0
    assert '_with_events' not in vars(learn)
    assert not al._rec or not (al._rec._bufs or al._rec._plans or al._rec._gens or al._rec._handles)
    return True


def numpy_stats(x):
    x = x.astype(np.float64).ravel()
    ok = x[np.isfinite(x)]
    return dict(mean=ok.mean(), std=ok.std(), min=ok.min(), max=ok.max(), near_zero=(np.abs(ok) <= .05).sum()/len(x), nonfinite=1 - len(ok)/len(x))


def row(rec, i=0): return {k: float(v[i]) for k, v in A._columns(rec[0]).items()}


class Out(nn.Module):
    "A module with a parameter that returns whatever `f` makes of its input"
    def __init__(self, f): super().__init__(); self.w, self.f = nn.Parameter(torch.ones(1)), f
    def forward(self, x): return self.f(x*self.w)


def record(model, x, **kw):
    rec = ActivationRecorder(model, **kw)
    with rec: model(x)
    assert not rec.problems, rec.problems
    return rec


# ---- the breakages of other monitors, one test each

@dataclasses.dataclass
class Pair: a: torch.Tensor; b: torch.Tensor


@pytest.mark.parametrize('f', [lambda x: {'out': x, 'aux': [x*2]}, lambda x: [x, (x*2,)], lambda x: Pair(x, x*2), lambda x: (x, {'b': x*2}, None, 3, 'text', torch.arange(3))],
                         ids=['dict', 'list', 'dataclass', 'tuple'])
def test_fastai_dict_and_list_outputs(f):
    x = torch.randn(4, 5)
    rec = record(Out(f), x, sample=None)
    want = numpy_stats(np.concatenate([x.numpy(), 2*x.numpy()]))
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_fastai_dict_output_in_training():
    learn = get_learner(nn.Sequential(Out(lambda x: {'x': x}), DictHead()), cbs=ActivationLogger())
    learn.fit(1)
    assert len(learn.activation_logger.stats) == 6 and is_clean(learn)


class DictHead(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(3*16*16, 2)
    def forward(self, d): return self.l(d['x'].flatten(1))


class Odd(nn.Module):
    "An LSTM, a module that never runs, one that runs twice"
    def __init__(self):
        super().__init__()
        self.rnn, self.unused, self.shared, self.head = nn.LSTM(16, 12, batch_first=True), nn.Linear(3, 3), nn.Linear(12, 12), nn.Linear(12, 2)
    def forward(self, x): return self.head(self.shared(self.shared(self.rnn(x[:, 0])[0])).mean(1))


def test_fastai_layer_stats_on_lstm_unused_and_shared():
    learn = get_learner(Odd(), cbs=ActivationLogger())
    learn.fit(2)
    al = learn.activation_logger
    for i in range(4): assert [len(o) for o in al.layer_stats(i)] == [12]*3
    for n in ('rnn', 'shared', 'head'): assert np.isfinite(al.layer_stats(n)[0]).all()
    assert np.isnan(al.layer_stats('unused')[0]).all() and 'unused' not in set(al.to_df().layer)
    assert 'Never ran: unused' in str(al.summary())
    assert al.to_df().query('layer=="shared" and split=="train"')['count'].iloc[0] == 2*8*16*12


def test_shared_module_counts_both_calls():
    l = nn.Linear(6, 6)
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.l = l
        def forward(self, x): return self.l(self.l(x))
    x = torch.randn(7, 6)
    rec = record(Twice(), x, sample=None)
    with torch.no_grad(): want = numpy_stats(torch.cat([l(x), l(l(x))]).numpy())
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_fastai_nan_is_not_healthy():
    def f(x): x = x.clone(); x[0, 0] = math.nan; x[0, 1] = math.inf; return x
    r = row(record(Out(f), torch.ones(4, 5), sample=None).record)
    assert r['nonfinite'] == pytest.approx(.1) and r['mean'] == 1 and r['near_zero'] == 0


def test_fastai_negative_is_not_near_zero():
    assert row(record(Out(lambda x: x), -torch.ones(4, 5)).record)['near_zero'] == 0


def test_fastai_copies_little_to_the_host(monkeypatch):
    copies, real = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda t, *a, **k: copies.append(t.numel()) or real(t, *a, **k))
    m = small()
    rec = ActivationRecorder(m)
    with rec: m(torch.randn(8, 3, 32, 32))
    assert len(copies) == 1 and copies[0] < 1000


def test_no_item_per_layer(monkeypatch):
    m = small()
    rec = ActivationRecorder(m)
    def item(t): raise AssertionError('.item() was called')
    monkeypatch.setattr(torch.Tensor, 'item', item)
    rec.start(); m(torch.randn(8, 3, 32, 32)); rec.stop(); rec.collect()
    assert not rec.problems


def test_miniai_ram_and_index_only():
    al = ActivationLogger(keep=8)
    learn = get_learner(cbs=al)
    learn.fit(10)
    assert len(al._hist['train']) <= 8 and sum(m['batches'] for m in al._hist['train'].meta) == 60
    assert al.layer_stats('3') == al.layer_stats(2)


def test_composer_one_row_per_layer_not_per_sample():
    learn = get_learner(cbs=ActivationLogger(valid=False))
    learn.fit(1)
    df = learn.activation_logger.to_df()
    assert len(df) == 6*5 and not df.duplicated(['step', 'layer']).any()


@pytest.mark.parametrize('shape', [(7,), (7, 5), (2, 7, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4), (1, 2, 3, 2, 2, 2), ()])
def test_timm_outputs_of_any_number_of_axes(shape):
    x = torch.randn(shape)
    rec = record(Out(lambda x: x), x, sample=None)
    assert {k: row(rec.record)[k] for k in stats} == pytest.approx(numpy_stats(x.numpy()), rel=1e-5, abs=1e-6)


def test_timm_hooks_can_be_removed():
    m = small()
    rec = ActivationRecorder(m).start()
    assert n_hooks(m) == 5
    rec.stop()
    assert n_hooks(m) == 0


def test_vissl_nested_tuples_end():
    loop = []
    loop.append(loop)
    d = {}
    d['d'] = d
    deep = x = torch.randn(3)
    for _ in range(50): deep = (deep,)
    assert [id(t) for t in A._tensors((loop, d, x, deep, x))] == [id(x)]


def test_torchexplorer_first_batch_nan_and_infinite_shares():
    x = torch.full((10, 10), math.nan)
    r = record(Out(lambda x: x), x)
    assert row(r.record)['nonfinite'] == 1 and math.isnan(row(r.record)['mean']) and r.record[1].sum() == 0
    x = torch.randn(10, 10); x.view(-1)[:30] = math.inf
    r = record(Out(lambda x: x), x)
    assert row(r.record)['nonfinite'] == pytest.approx(.3) and r.record[1].sum() == 70
    al = ActivationLogger(alerts=False)
    learn = get_learner(nn.Sequential(Out(lambda x: x*math.nan), nn.Flatten(), nn.Linear(768, 2)), cbs=al)
    learn.fit(1)
    al.plot(); al.plot('nonfinite'); al.plot_layer_stats(0); al.summary()


def test_neptune_keeps_no_activation_alive():
    refs = []
    m = nn.Sequential(Out(lambda x: refs.append(weakref.ref(y := x+1)) or y), Out(lambda x: x))
    rec = ActivationRecorder(m)
    with torch.no_grad(), rec: m(torch.randn(8, 3, 64, 64))
    gc.collect()
    assert refs and all(r() is None for r in refs)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('sample', [None, 4096])
def test_neptune_half_precisions(dtype, sample):
    x = (torch.randn(8, 16, 8, 8)*300).to(dtype)  # the sum and the squares are beyond float16
    rec = record(Out(lambda x: x).to(dtype), x, sample=sample)
    got, want = row(rec.record), numpy_stats(x.double().numpy())
    if sample is None: assert {k: got[k] for k in stats} == pytest.approx(want, rel=1e-5, abs=1e-4)
    else: assert abs(got['mean']-want['mean']) < 5*want['std']/64 and got['std'] == pytest.approx(want['std'], rel=.1)


def test_wandb_watch_sees_activations_and_keeps_nonfinite():
    al = ActivationLogger()
    learn = get_learner(nn.Sequential(Out(lambda x: torch.where(x > 1, math.inf, x)), Out(lambda x: x.nan_to_num(posinf=1)), nn.Flatten(), nn.Linear(768, 2)), cbs=al)
    with pytest.warns(ActivationWarning, match='NaN or infinite'): learn.fit(1)
    assert (al.to_df().query('layer=="0"').nonfinite > .1).all()


def test_torchinstruments_never_rewrites_parquet(tmp_path):
    learn = get_learner(cbs=ActivationLogger(to=tmp_path/'a.parquet'))
    learn.fit(1)
    one = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a.parquet').iterdir()}
    learn.fit(1)
    two = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'a.parquet').iterdir()}
    assert one.items() < two.items()


def test_torchinstruments_channels_and_batchnorm():
    torch.manual_seed(0)
    m = small().eval()
    m[1].running_mean += .5
    m[0].weight.data[2:] = 0  # six channels of eight that never vary
    rec = record(m, torch.randn(16, 3, 32, 32), sample=None)
    assert row(rec.record, 0)['dead'] == .75 and row(rec.record, 1)['bn_dist'] > 0


# ---- exactness

def test_default_layers_and_selection():
    m = small()
    names = lambda layers: list(A._select(m, layers))
    assert names(None) == ['0', '1', '3', '4', '8'] == names(list('01348'))
    assert names(nn.Conv2d) == ['0', '3'] and names((nn.Conv2d, 'x*', nn.ReLU)[::2]) == ['0', '2', '3', '5']
    assert names(m[2]) == ['2'] and names([m[8], '0']) == ['0', '8'] and names(lambda n, l: n.isdigit() and int(n) > 6) == ['7', '8']
    assert names('[0-2]') == ['0', '1', '2'] and len(names('*')) == 10
    assert list(A._select(nn.Linear(2, 2), None)) == ['Linear']
    with pytest.raises(ValueError, match=r"no module of this Sequential matches 'conv\*'.*called 0, 1, 2"): names('conv*')
    with pytest.raises(ValueError, match='no module of this Sequential matches'): names(nn.LSTM)
    with pytest.raises(TypeError, match='received 3'): names(3)
    with pytest.raises(ValueError, match='no module with parameters'): A._select(nn.Sequential(nn.ReLU()), None)


def test_attention_is_one_layer():
    m = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    rec = ActivationRecorder(m)
    assert 'self_attn' in rec.names and not any('out_proj' in n for n in rec.names)
    with rec: m(torch.randn(2, 5, 16))
    assert rec.calls[:len(rec.names)].all()


@pytest.mark.parametrize('kw', [dict(every=0), dict(every=1.5), dict(keep=1), dict(sample=10), dict(to='x.txt'), dict(to=3)])
def test_arguments_are_checked(kw):
    with pytest.raises(ValueError, match=f'`{next(iter(kw))}` .*received'): ActivationLogger(**kw)


arrays = st.tuples(st.integers(0, 2**31-1), st.sampled_from([(3, 4), (2, 3, 5), (4, 3, 6, 5), (700, 33), (4, 16, 20, 20), (2, 5, 3, 4, 4)]),
                   st.sampled_from([1e-6, .05, 1, 1e4]), st.sampled_from([0, 3, -1000]), st.sampled_from(['plain', 'last', 'T', 'step', 'expand']))


@settings(max_examples=60, deadline=None)
@given(arrays, st.sampled_from([0, .01, .4]))
def test_exact_equals_float64_numpy(a, bad):
    seed, shape, scale, shift, layout = a
    g = np.random.default_rng(seed)
    x = torch.tensor(g.standard_normal(shape)*scale+shift, dtype=torch.float64)
    x[torch.tensor(g.random(shape) < bad)] = math.nan
    if x.isfinite().sum() < 2: return
    if layout == 'last' and x.ndim == 4: x = x.contiguous(memory_format=torch.channels_last)
    elif layout == 'T': x = x.transpose(0, -1)
    elif layout == 'step': x = x[..., ::2]
    elif layout == 'expand': x = x[:1].expand(3, *x.shape[1:])
    if x.isfinite().sum() < 2: return
    rec = ActivationRecorder(m := Out(lambda x: x), sample=None)
    m.f = lambda _: x
    with rec: m(torch.ones(1))
    assert not rec.problems, rec.problems
    got, want = row(rec.record), numpy_stats(x.numpy())
    for k in stats: assert got[k] == pytest.approx(want[k], rel=1e-9, abs=1e-9*(abs(shift)+scale)), k
    ok = x.numpy()[np.isfinite(x.numpy())]
    edges, H = A._edges(rec.record[2][0]), rec.record[1][0]
    assert H.sum() == len(ok)
    lo, hi = edges[0], edges[-1]
    far = np.abs(ok-ok.mean()) > 8*ok.std()
    assert np.array_equal(np.histogram(ok[~far], edges)[0][1:-1], H[1:-1]) and 20 <= np.ptp(np.flatnonzero(H)) + 45


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31-1), st.lists(st.tuples(st.sampled_from([1e-3, 1, 50]), st.sampled_from([-7, 0, 2]), st.integers(1, 300)), min_size=2, max_size=6), st.booleans())
def test_merging_equals_all_at_once(seed, parts, nan):
    g = np.random.default_rng(seed)
    xs = [g.standard_normal(n)*s+m for s, m, n in parts]
    if nan: xs[0][0] = math.nan
    recs = []
    for x in xs:
        rec = ActivationRecorder(m := Out(lambda x: x), sample=None)
        m.f = lambda _, x=x: torch.tensor(x)
        with rec: m(torch.ones(1))
        recs.append(rec.record)
    both = recs[0]
    for r in recs[1:]: both = A._merge(both, r)
    all_ = np.concatenate(xs)
    if not np.isfinite(all_).any(): return
    got, want = row(both), numpy_stats(all_)
    for k in stats: assert got[k] == pytest.approx(want[k], rel=1e-8, abs=1e-8), k
    assert both[1].sum() == np.isfinite(all_).sum()
    # the histogram is the histogram of all values on the wider bins
    edges = A._edges(both[2][0])
    cum, true = np.cumsum(both[1][0]), [(all_ < e).sum() for e in edges[1:]]
    assert np.abs(cum-true)[np.abs(edges[1:]-all_[np.isfinite(all_)].mean()) < 4*np.nanstd(all_)].max(initial=0) <= max(2, .03*len(all_))


def test_histogram_merge_moves_nothing_between_bins():
    a, b = np.zeros((1, 64), np.int64), np.zeros((1, 64), np.int64)
    a[0, [0, 5, 63]], b[0, [1, 60]] = [1, 2, 3], [4, 5]
    ea, eb = np.array([[0, -10]]), np.array([[2, -3]])  # widths 1 and 4
    c, e = A._merge_hists(a, ea, b, eb)
    got = {(lo, lo+2.**e[0, 0]): n for lo, n in zip(A._edges(e[0]), c[0]) if n}
    w = 2.**e[0, 0]
    want = {}
    for lo, n in [(-10, 1), (-5, 2), (53, 3), (-8, 4), (228, 5)]:
        k = math.floor(lo/w)*w
        want[(k, k+w)] = want.get((k, k+w), 0)+n
    assert got == want and w in (4, 8)


# ---- sampling

def patterns():
    g = torch.Generator().manual_seed(1)
    n, c, h, w = 8, 32, 32, 32
    i = torch.arange
    yield 'column', (i(w) % 2).float().expand(n, c, h, w)
    yield 'row', (i(h) % 4 == 0).float()[:, None].expand(n, c, h, w)
    yield 'channel', (i(c)**2).float()[:, None, None].expand(n, c, h, w)
    yield 'sample', (i(n) == 3).float()[:, None, None, None].expand(n, c, h, w)
    yield 'pixel', ((i(h)[:, None]*w+i(w)) % 16 == 0).float().expand(n, c, h, w)
    yield 'corner', ((i(h)[:, None] < 8) & (i(w) < 8)).float().expand(n, c, h, w)
    yield 'diagonal', ((i(h)[:, None]+i(w)+i(c)[:, None, None]) % 32 == 0).float().expand(n, c, h, w)
    yield 'noise', torch.rand(n, c, h, w, generator=g)


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last', 'expanded', 'transposed'])
@pytest.mark.parametrize('name,x', list(patterns()), ids=[n for n, _ in patterns()])
def test_sampling_is_unbiased_within_the_stated_bound(name, x, layout):
    x = dict(contiguous=lambda: x.contiguous(), channels_last=lambda: x.contiguous(memory_format=torch.channels_last), expanded=lambda: x,
             transposed=lambda: x.contiguous().transpose(2, 3))[layout]()
    mean, std = x.double().mean().item(), x.double().std(correction=0).item()
    rec = ActivationRecorder(m := Out(lambda _: x), hist=False)
    err = []
    for _ in range(40):
        with rec: m(torch.ones(1))
        rec._plans = {}  # new places
        err.append((row(rec.record)['mean']-mean)/(std/64))
    err = np.array(err)
    assert np.abs(err).max() < 5 and np.sqrt((err**2).mean()) < 1.35  # one standard error at most
    assert abs(err.mean()) < 4/np.sqrt(40)


@pytest.mark.parametrize('shape,stride,axis', [((8, 32, 32, 32), None, 1), ((8, 32, 32, 32), 'last', 1), ((64, 100), None, 1), ((5, 77, 30), None, 2), ((3, 5000), None, 1), ((9001,), None, None)])
def test_every_element_is_as_likely(shape, stride, axis):
    x = torch.arange(math.prod(shape)).view(shape)
    if stride: x = x.contiguous(memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(0)
    flat, n, reps = x.as_strided((x.numel(),), (1,)), x.numel(), 400
    count = torch.zeros(n)
    for _ in range(reps):
        idx, C, K, _ = A._places(x.shape, x.stride(), axis, 1024, lambda *s: torch.rand(*s, generator=g, dtype=torch.float64))
        assert len(idx) == 1024
        count.index_add_(0, flat[idx], torch.ones(1024))
        if C: assert (torch.bincount(torch.unravel_index(flat[idx[:C*K]], shape)[axis]) == K).all()
    p = 1024/n
    z = (count-reps*p)/math.sqrt(reps*p)
    assert z.abs().max() < 7 and z.square().mean() < 1.3
    parts = torch.stack([o.sum() for o in count.chunk(16)])  # no region is preferred
    assert (parts/parts.mean()-1).abs().max() < .05


def test_places_change():
    x = torch.randn(8, 16, 32, 32)
    rec = ActivationRecorder(m := Out(lambda _: x), hist=False)
    seen = set()
    for _ in range(24):
        with rec: m(torch.ones(1))
        seen.add(row(rec.record)['mean'])
    assert len(seen) >= 3


def test_global_random_state_is_left_alone():
    m, x = small(), torch.randn(8, 3, 64, 64)
    torch.manual_seed(3); np.random.seed(3)
    with ActivationRecorder(m): m(x)
    a, b = torch.rand(1), np.random.rand()
    torch.manual_seed(3); np.random.seed(3)
    assert torch.rand(1) == a and np.random.rand() == b


@pytest.mark.parametrize('sample', [None, 4096])
def test_logging_does_not_change_training(sample):
    def run(cbs):
        set_seed(1)
        learn = get_learner(cbs=cbs)
        set_seed(1)
        learn.fit(2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(run(None), run(ActivationLogger(sample=sample, grads=True)))
