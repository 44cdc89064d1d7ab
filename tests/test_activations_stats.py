"Statistics that are asked for by name, and those of one's own, against SciPy and NumPy in float64"
import copy, math, pickle, warnings

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

warnings.filterwarnings('ignore', category=FutureWarning)
from fastai.basics import Callback
from fastai.torch_core import set_seed
from fastai_normx import record as S
from fastai_normx.activations import ActivationLogger, ActivationLoggerWarning, ActivationRecorder, ActivationStat
from test_activations import Out, get_learner, record

pytestmark = pytest.mark.filterwarnings('error::fastai_normx.activations.ActivationLoggerWarning', 'error::fastai_normx.activations.ActivationWarning')
percentiles = ['p25', 'p50', 'p75']
usual = ['layer', 'count', 'mean', 'std', 'min', 'max', 'near_zero', 'nonfinite', 'dead', 'bn_dist']


@pytest.fixture
def table():
    "What a test registers is gone afterwards"
    was = dict(S._known), dict(S._states)
    yield
    for now, old in zip((S._known, S._states), was): now.clear(); now.update(old)


def of(x, stats, **kw):
    "What is recorded of a layer that puts out `x`"
    rec = ActivationRecorder(m := Out(lambda _: x), stats=stats, **kw)
    with rec: m(torch.ones(1))
    assert not rec.problems, rec.problems
    return rec.to_df().iloc[0]


def tensors():
    g = torch.Generator().manual_seed(0)
    def randn(*shape): return torch.randn(shape, generator=g, dtype=torch.float64)
    conv = randn(16, 24, 40, 40)
    yield 'normal', conv
    yield 'channels last', conv.contiguous(memory_format=torch.channels_last)
    yield 'relu', conv.relu()
    yield 'heavy', randn(64, 40, 100)**5
    yield 'far from zero', conv*.5+100
    yield 'channels differ', conv*.1+randn(24)[:, None, None]
    yield 'small maps', randn(64, 80, 3, 3)+1
    yield 'linear', randn(500, 37).exp()
    yield 'tokens', randn(8, 197, 192)
    yield 'step', randn(9, 30, 50)[..., ::2]
    yield 'no channels', randn(100_000)
    yield 'few', randn(3, 5)
tensors = dict(tensors())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', tensors)
def test_all_values_give_what_scipy_and_numpy_say(name, dtype):
    x = tensors[name].to(dtype)
    got, y = of(x, ['kurtosis', *percentiles], sample=None), x.double().numpy().ravel()
    assert got['kurtosis'] == pytest.approx(scipy.stats.kurtosis(y), rel=1e-9 if dtype == torch.float64 else 2e-4, abs=2e-4)
    assert got[percentiles].tolist() == pytest.approx(np.percentile(y, [25, 50, 75]).tolist(), rel=1e-6, abs=1e-7)
    assert got['std'] == pytest.approx(y.std(), rel=1e-5)    # as without them


@pytest.mark.parametrize('name', tensors)
def test_a_layer_that_fits_the_sample_is_read_in_full(name):
    x = tensors[name].flatten()[:4000].float()
    x = x.view(-1, 5)
    got, y = of(x, ['kurtosis', *percentiles]), x.double().numpy().ravel()
    assert got['kurtosis'] == pytest.approx(scipy.stats.kurtosis(y), rel=1e-4, abs=1e-4)
    assert got[percentiles].tolist() == pytest.approx(np.percentile(y, [25, 50, 75]).tolist(), rel=1e-6, abs=1e-7)


def test_a_sample_is_within_its_standard_error():
    x = tensors['normal'].float()
    got = of(x, ['kurtosis', *percentiles])
    assert abs(got['kurtosis']) < 5*math.sqrt(24/4096)
    error = math.sqrt(.25*.75/4096)/scipy.stats.norm.pdf(scipy.stats.norm.ppf(.25))
    assert got[percentiles].tolist() == pytest.approx(scipy.stats.norm.ppf([.25, .5, .75]).tolist(), abs=5*error)


@pytest.mark.parametrize('sample', [None, 4096])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_what_is_not_finite_is_left_out(sample, dtype):
    x = tensors['linear'][:100].to(dtype)
    x[0, :5], x[7, 3], x[9] = math.nan, math.inf, -math.inf
    got, y = of(x, ['kurtosis', *percentiles], sample=sample), x.double().numpy().ravel()
    y = y[np.isfinite(y)]
    assert got['kurtosis'] == pytest.approx(scipy.stats.kurtosis(y), rel=1e-5)
    assert got[percentiles].tolist() == pytest.approx(np.percentile(y, [25, 50, 75]).tolist(), rel=1e-6)
    assert of(x*math.nan, ['kurtosis', *percentiles], sample=sample)[['kurtosis', *percentiles]].isna().all()


@pytest.mark.parametrize('sample', [None, 4096])
def test_what_does_not_vary_has_no_kurtosis(sample):
    got = of(torch.full((64, 40), 1.1), ['kurtosis', *percentiles], sample=sample)
    assert math.isnan(got['kurtosis']) and got[percentiles].tolist() == pytest.approx([1.1]*3)
    x = torch.randn(16, 8, 20, 20)
    x[:, :6] = 1.1    # channels that do not vary, among others that do
    assert of(x, 'kurtosis', sample=sample)['kurtosis'] == pytest.approx(scipy.stats.kurtosis(x.double().numpy().ravel()), rel=.3 if sample else 1e-5)


def shares(x, quantiles):
    "What part of `x` lies below these values, and what part not above"
    return [((x < q).mean(), (x <= q).mean()) for q in quantiles]


@pytest.mark.parametrize('name', ['normal', 'relu', 'heavy', 'far from zero', 'few'])
def test_several_calls_and_several_batches_are_one(name):
    x = tensors[name].flatten()[:6000].double()
    parts = [x[:2000], x[2000:2300]*3+1, x[2300:]-2]
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.l = Out(lambda x: x)
        def forward(self, xs): return [self.l(x) for x in xs]
    parts = [p for p in parts if len(p)]
    both = record(Shared(), parts, sample=None, stats=['kurtosis', *percentiles])
    recs = [record(Shared(), [p], sample=None, stats=['kurtosis', *percentiles]).record for p in parts]
    recs = [pickle.loads(pickle.dumps(r)) for r in recs]    # as processes exchange them
    y = torch.cat(parts).numpy()
    for rec in (both.record, S.Record.together(recs)):
        assert rec.column('kurtosis')[0] == pytest.approx(scipy.stats.kurtosis(y), rel=1e-8, abs=1e-8)
        for p, (below, upto) in zip((.25, .5, .75), shares(y, [rec.column(k)[0] for k in percentiles])):
            assert below-1/32 <= p <= upto+1/32


def test_a_history_that_is_thinned_out():
    def fit(keep):
        set_seed(1)
        learn = get_learner(cbs=ActivationLogger(sample=None, keep=keep, stats=['kurtosis', *percentiles]))
        learn.fit(1)
        return learn.activation_logger
    every, few = fit(None), fit(2)
    want = S.Record.together(every._hist['train'].recs)
    got = S.Record.together(few._hist['train'].recs)
    assert np.allclose(want.column('kurtosis'), got.column('kurtosis'), rtol=1e-6)
    spread = want.column('p75')-want.column('p25')
    for k in percentiles: assert (np.abs(want.column(k)-got.column(k)) <= .1*spread+1e-6).all()


def test_gradients_and_the_loss_scale():
    class Scaled(Callback):
        def __init__(self): self.scaler = type('Scaler', (), dict(get_scale=lambda self: 1024.))()
        def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    cols = ['grad_kurtosis', *(f'grad_{p}' for p in percentiles)]
    dfs = []
    for cbs in ([], [Scaled()]):
        set_seed(1)
        learn = get_learner(cbs=[ActivationLogger(grads=True, sample=None, stats=['kurtosis', *percentiles]), *cbs])
        learn.fit(1, lr=0)
        dfs.append(learn.activation_logger.to_df().query("split=='train'"))
    assert np.isfinite(dfs[0][cols].to_numpy()).all() and dfs[0].grad_p75.abs().max() > 0
    np.testing.assert_allclose(dfs[0][cols], dfs[1][cols], rtol=1e-3, atol=1e-7)


def test_the_table_stays_as_it_is_without_them(tmp_path):
    assert list(record(nn.Linear(3, 3), torch.randn(4, 3)).to_df()) == usual
    assert list(of(torch.randn(4, 3), percentiles[:1]).index) == [*usual, 'p25']
    get_learner(cbs=ActivationLogger(to=tmp_path/'a.csv', stats='kurtosis')).fit(1)
    meta = ['split', 'fit', 'epoch', 'batch', 'step', 'batches']
    assert list(pd.read_csv(tmp_path/'a.csv')) == [*meta, *usual, 'kurtosis']


def test_summary_and_plots():
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm
    learn = get_learner(cbs=ActivationLogger(grads=True, stats=['kurtosis', 'p50']))
    learn.fit(1)
    al = learn.activation_logger
    assert {'kurtosis', 'p50'} <= set(str(al.summary()).splitlines()[3].split()) and 'p25' not in str(al.summary())
    ax = al.plot('kurtosis')
    assert ax.get_title().startswith("excess kurtosis of each layer's output") and isinstance(ax.images[0].norm, SymLogNorm)
    want = al.to_df().query("split=='train'").pivot(index='layer', columns='step', values='kurtosis').to_numpy()
    assert np.allclose(ax.images[0].get_array(), want)
    al.plot('p50', relative=True); al.plot('grad_kurtosis')
    with pytest.raises(ValueError, match=r"received 'p25'. It is recorded by `ActivationLogger\(stats=\['p25'\]\)`"): al.plot('p25')
    plt.close('all')


def test_tensorboard_gets_them(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    learn = get_learner()
    with SummaryWriter(tmp_path) as w: learn.fit(1, cbs=(al := ActivationLogger(to=w, stats='kurtosis')))
    ea = EventAccumulator(str(tmp_path)); ea.Reload()
    want = al.to_df().query("split=='train' and layer=='0'")['kurtosis'].tolist()
    assert [e.value for e in ea.Scalars('train_kurtosis/0')] == pytest.approx(want, rel=1e-5)
    tags = ea.Tags()['scalars']
    assert 'train_mean/0' in tags and not any('count' in t or 'p50' in t for t in tags)


def test_copies_and_exports_know_what_was_asked_for():
    al = ActivationLogger(stats=['kurtosis'])
    for o in (copy.copy(al), pickle.loads(pickle.dumps(al))):
        learn = get_learner(cbs=o)
        learn.fit(1)
        assert 'kurtosis' in o.to_df()


# ---- of one's own

@pytest.mark.parametrize('sample', [None, 4096])
def test_a_function(table, sample):
    @ActivationStat.register(label='share above one')
    def above(x): return (x > 1).float().mean(1)
    x = torch.randn(32, 8, 12, 12)
    assert above(torch.tensor([[0., 2.]])).tolist() == [.5]    # it stays what it was
    assert of(x, 'above', sample=sample)['above'] == pytest.approx((x > 1).float().mean().item(), abs=.04 if sample else 1e-6)
    learn = get_learner(cbs=ActivationLogger(sample=sample, stats=['above'], keep=2))
    learn.fit(1)
    df = learn.activation_logger.to_df()
    assert df.above.between(0, 1).all() and 'above' in str(learn.activation_logger.summary())
    assert learn.activation_logger.plot('above').get_title().startswith('share above one')


@pytest.mark.parametrize('sample', [None, 4096])
def test_a_class(table, sample):
    @ActivationStat.register
    class Largest(ActivationStat):
        name, streams = 'largest', True
        def of(self, b): return torch.maximum(b.max, -b.min)
        def merge(self, p): return p.max(p['largest'])
    xs = [torch.randn(20, 10), torch.randn(5, 100)*4]
    class Shared(nn.Module):
        def __init__(self): super().__init__(); self.l = Out(lambda x: x)
        def forward(self, xs): return [self.l(x) for x in xs]
    got = record(Shared(), xs, sample=sample, stats='largest').to_df()
    assert got.largest[0] == pytest.approx(max(x.abs().max() for x in xs).item())


def test_another_device_and_values_that_are_not_finite(table, monkeypatch):
    @ActivationStat.register
    def middle(x): return x.nanmedian(1).values
    x = torch.randn(33, 31)
    x[0, :7] = math.nan
    want = [of(x, ['middle', 'kurtosis', *percentiles], sample=s) for s in (None, 4096)]
    y = x.double().numpy().ravel()
    assert want[0]['middle'] == pytest.approx(np.sort(y[np.isfinite(y)])[(np.isfinite(y).sum()-1)//2])
    from fastai_normx import recorder as R
    for module in (R, S): monkeypatch.setattr(module, '_is_cpu', lambda dev: False)
    for w, s in zip(want, (None, 4096)):
        got = of(x, ['middle', 'kurtosis', *percentiles], sample=s)
        assert got.drop('layer').astype(float).tolist() == pytest.approx(w.drop('layer').astype(float).tolist(), rel=1e-5, nan_ok=True)


def test_a_function_that_does_not_do(table):
    @ActivationStat.register
    def whole(x): return x.mean()
    learn = get_learner(cbs=ActivationLogger(stats='whole'))
    with pytest.warns(ActivationLoggerWarning, match="statistic 'whole' was given values of shape .* and has to give one number for each row"): learn.fit(1)
    assert learn.epoch == 0 and learn.iter > 0    # training went on


def test_names(table):
    for wrong in ('median', ['kurtosis', 'nope'], 5, [nn.Linear]):
        for f in (lambda: ActivationLogger(stats=wrong), lambda: ActivationRecorder(nn.Linear(2, 2), stats=wrong)):
            with pytest.raises(ValueError, match='`stats` takes names of statistics: kurtosis, p25, p50, p75 .mean, std, .* received'): f()
    for name in ('mean', 'layer', 'count', 'kurtosis', 'hist', 'not a name'):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"): ActivationStat.register(name=name)(lambda x: x.mean(1))
    with pytest.raises(ValueError, match="has no 'colour': it has name, label"): ActivationStat.register(colour='red')
    for k in (1, 2):    # a cell that runs again
        @ActivationStat.register
        def mine(x): return x.mean(1)*0+k
    assert of(torch.randn(4, 4), ['mine', 'mean'])['mine'] == 2
