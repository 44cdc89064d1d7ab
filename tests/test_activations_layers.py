"Layers of every kind in `ActivationLogger`: recorded rightly, or said once, in words that name the cause. Right values are our own hooks', in float64."
import copy, math, warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

warnings.filterwarnings('ignore', category=FutureWarning)
from fastai.basics import Callback, DataLoaders, Learner
from fastai.data.load import DataLoader
from fastai_normx.activations import ActivationLogger, ActivationLoggerWarning, ActivationRecorder, ActivationWarning

pytestmark = pytest.mark.filterwarnings('error::fastai_normx.activations.ActivationLoggerWarning', 'error::fastai_normx.activations.ActivationWarning')


class Out(nn.Module):
    "A module with a parameter that returns whatever `f` makes of its input"
    def __init__(self, f): super().__init__(); self.w, self.f = nn.Parameter(torch.ones(1)), f
    def forward(self, x): return self.f(x*self.w)


class Via(nn.Module):
    "`body`, whose output only its sum is used of, beside a linear layer"
    def __init__(self, body, total=lambda o: o.sum()): super().__init__(); self.body, self.head, self.total = body, nn.Linear(12, 2), total
    def forward(self, x): return self.head(x) + 0*self.total(self.body(x))


def get_learner(model, *cbs, n=24, bs=4, x=None, loss=None):
    torch.manual_seed(0)
    items = list(zip(torch.randn(n, 12) if x is None else x, [0, 1]*(n//2)))
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items, bs=bs))
    learn = Learner(dls, model, loss_func=loss or nn.CrossEntropyLoss(), cbs=cbs)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == 'ProgressCallback'])
    learn.logger = lambda *a: None
    return learn


def fitted(model, n=1, said=0, cbs=(), warning=ActivationLoggerWarning, x=None, loss=None, **kw):
    "The logger after a fit, and what it said"
    al = ActivationLogger(**kw)
    learn = get_learner(model, al, *cbs, x=x, loss=loss)
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.fit(n)
    ws = [str(w.message) for w in ws if issubclass(w.category, (ActivationLoggerWarning, ActivationWarning))]
    assert len(ws) == said, ws
    return al, ws


def recorded(m, x, **kw):
    rec = ActivationRecorder(m, **kw)
    with rec, torch.no_grad(): m(x)
    assert not rec.problems, rec.problems
    return rec.to_df().iloc[0]


# ---- the axis of the channels

class ChannelNorm(nn.LayerNorm):
    "A LayerNorm that works on the second axis, as in ConvNeXt"
    def forward(self, x): return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class OwnNorm(nn.Module):
    "The same with everything its own"
    def __init__(self, c): super().__init__(); self.weight, self.bias, self.normalized_shape = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c)), (c,)
    def forward(self, x):
        d = x-x.mean(1, keepdim=True)
        return d/(d.square().mean(1, keepdim=True)+1e-6).sqrt()*self.weight[:, None, None]+self.bias[:, None, None]


class LastNorm(OwnNorm):
    def forward(self, x): return F.layer_norm(x, self.normalized_shape, self.weight, self.bias)


def dead_share(y, axis):
    y = y.double().movedim(axis, 0).flatten(1).numpy()
    return np.mean(y.min(1) == y.max(1))


@pytest.mark.parametrize('sample', [None, 4096])
@pytest.mark.parametrize('norm,shape,axis', [(ChannelNorm, (8, 12, 9, 9), 1), (OwnNorm, (8, 12, 9, 9), 1), (LastNorm, (8, 9, 9, 12), 3), (nn.LayerNorm, (8, 9, 9, 12), 3), (nn.LayerNorm, (8, 12, 12, 12), 3),
                                             (LastNorm, (8, 40, 12), 2), (ChannelNorm, (8, 12, 40), 1)])
def test_dead_channels_of_a_norm_on_any_axis(norm, shape, axis, sample):
    if norm is OwnNorm and len(shape) == 3: return
    m, x = norm(12), torch.randn(shape)
    with torch.no_grad(): m.weight[:9] = 0
    rec = ActivationRecorder(m, sample=sample)
    for _ in range(6):
        with rec, torch.no_grad(): y = m(x)
    assert dead_share(y, axis) == .75 == rec.to_df().dead[0]


def test_where_two_axes_fit_memory_decides_or_it_is_not_known():
    m, x = OwnNorm(12), torch.randn(8, 12, 12, 12)
    with torch.no_grad(): m.weight[:9] = 0
    assert math.isnan(recorded(m, x, sample=None)['dead'])
    assert recorded(m, x.contiguous(memory_format=torch.channels_last), sample=None)['dead'] == .75
    assert recorded(nn.Conv2d(12, 12, 1, bias=False), x, sample=None)['dead'] == 0       # whose type says


# ---- foreign modules

class Rude(nn.Linear):
    "A module some of whose properties raise"
    @property
    def out_channels(self): raise RuntimeError('not built yet')
    @property
    def num_features(self): raise KeyError('x')
    @property
    def hidden_size(self): raise NotImplementedError


def test_properties_that_raise():
    class Ruder(nn.Module):
        out_channels = num_features = hidden_size = property(lambda self: 1/0)
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(12))
        def forward(self, x): return x*self.w
    al, _ = fitted(nn.Sequential(Ruder(), Rude(12, 2)))
    assert set(al.to_df().layer) == {'0', '1'}


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws, self.d, self.l = nn.ParameterList([torch.eye(12), torch.ones(12)]), nn.ParameterDict(dict(b=torch.zeros(12))), nn.Linear(12, 2)
    def forward(self, x): return self.l(self.inner(x))
    def inner(self, x): return x@self.ws[0]*self.ws[1]+self.d['b']


def test_parameters_in_a_list_belong_to_its_owner():
    class Owner(Listed):
        def __init__(self): super().__init__(); del self.l
        def forward(self, x): return self.inner(x)
    assert ActivationRecorder(nn.Sequential(Owner(), nn.Linear(12, 2))).names == ['0', '1']
    al, _ = fitted(nn.Sequential(Owner(), nn.Linear(12, 2)))
    assert al.to_df().groupby('layer').size().to_dict() == {'0': 12, '1': 12} and 'Never' not in al.summary()


def test_names_of_wrappers_are_left_out():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    m = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(12, 12))), nn.Linear(12, 2))
    assert ActivationRecorder(m).names == ['0.0', '1']
    class Wrapper(nn.Module):
        def __init__(self, m): super().__init__(); self._fsdp_wrapped_module = m
        def forward(self, x): return self._fsdp_wrapped_module(x)
    al, _ = fitted(nn.Sequential(Wrapper(nn.Linear(12, 12)), nn.Sequential(Wrapper(nn.Linear(12, 2)))))
    assert set(al.to_df().layer) == {'0', '1.0'}


# ---- outputs of every kind

def nested(layout):
    def f(x):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.nested.as_nested_tensor([o[:3*(i+1)].view(-1, 3) for i, o in enumerate(x)], layout=layout)
    return f


@pytest.mark.parametrize('layout', [torch.jagged, torch.strided])
@pytest.mark.parametrize('grads', [False, True])
def test_nested_outputs_are_recorded(layout, grads):
    m = Out(nested(layout))
    x = torch.randn(4, 12)
    with torch.no_grad(): want = torch.cat([o.flatten() for o in m(x).unbind()]).double().numpy()
    got = recorded(m, x, sample=None)
    assert got['count'] == 30 and got['mean'] == pytest.approx(want.mean(), rel=1e-5) and got['std'] == pytest.approx(want.std(), rel=1e-5)
    al, _ = fitted(Via(m, lambda o: sum(t.sum() for t in o.unbind())), grads=grads, sample=None)
    assert al.to_df().query('layer=="body"')['count'].eq(30).all()
    if grads: assert al.to_df().query('layer=="body" and split=="train"').grad_max.notna().all()


class Box:
    def __init__(self, x): self.x = x


odd = dict(sparse=(lambda x: x.to_sparse(), lambda o: o.to_dense().sum(), 'a sparse tensor'), csr=(lambda x: x.to_sparse_csr(), lambda o: o.to_dense().sum(), 'a sparse tensor'),
           complex=(torch.fft.fft, lambda o: o.abs().sum(), 'complex numbers'), object=(Box, lambda o: o.x.sum(), 'an object of type Box'))


@pytest.mark.parametrize('kind', odd)
def test_outputs_that_cannot_be_read_are_said_once_for_all_layers(kind):
    f, total, why = odd[kind]
    class M(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.head = Out(f), Out(f), nn.Linear(12, 2)
        def forward(self, x): return self.head(x)+0*(total(self.a(x))+total(self.b(x)))
    al, (said,) = fitted(M(), 2, 1)
    assert said.startswith('2 layers: a, b are not recorded: ') and why in said
    assert set(al.to_df().layer) == {'head'} and f'Not recorded: a, b (the output is {why}' in al.summary()
    assert 'Never' not in al.summary() and np.isnan(al.layer_stats('a')).all()
    assert not any('0%' in l for l in str(al.summary()).splitlines() if l.split()[:1] == ['a'])
    al, (said,) = fitted(M(), 1, 1, layers=['a', 'b'])
    for read in (al.to_df, al.summary, al.plot):
        with pytest.raises(ValueError, match=f'Nothing is recorded: a, b put out {why}'): read()
    with pytest.raises(ValueError, match=why): (rec := ActivationRecorder(Out(f))).__enter__().model(torch.randn(4, 12)); rec.__exit__(); rec.to_df()


def test_vmap_and_wrapped_tensors_are_named():
    class Per(nn.Module):
        def __init__(self): super().__init__(); self.a, self.head = nn.Linear(12, 12), nn.Linear(12, 2)
        def forward(self, x): return self.head(torch.func.vmap(self.a)(x))
    al, (said,) = fitted(Per(), 2, 1)
    assert 'Layer a is not recorded: the output is a tensor inside of torch.func.vmap' in said and set(al.to_df().layer) == {'head'}
    from torch.testing._internal.two_tensor import TwoTensor
    al, (said,) = fitted(Via(Out(lambda x: TwoTensor(x.detach(), x.detach())), lambda o: 0), 1, 1)
    assert 'a TwoTensor, whose values are elsewhere' in said


def test_dtensor_is_named():
    import os, socket
    import torch.distributed as dist
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]))
    dist.init_process_group('gloo', rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
        mesh = init_device_mesh('cpu', (1,))
        al, (said,) = fitted(Via(Out(lambda x: distribute_tensor(x.detach(), mesh, [Replicate()])), lambda o: 0), 1, 1)
        assert 'Layer body is not recorded: the output is a DTensor' in said
    finally: dist.destroy_process_group()


def test_whole_numbers_are_no_fault():
    al, _ = fitted(Via(Out(lambda x: x.argmax(1)), lambda o: o.float().sum()))
    assert set(al.to_df().layer) == {'head'} and 'Not recorded: body (the output is whole numbers)' in al.summary()


# ---- gradients

class Check(nn.Module):
    def __init__(self, reentrant): super().__init__(); self.a, self.b, self.head, self.reentrant = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2), reentrant
    def forward(self, x): return self.head(torch.utils.checkpoint.checkpoint(lambda x: self.b(self.a(x)), x.requires_grad_() if self.training else x, use_reentrant=self.reentrant))


def test_gradients_in_checkpoints():
    al, (said,) = fitted(Check(True), 2, 1, grads=True)
    assert said == 'Gradients of a, b are not recorded: they ran without autograd, as in `torch.utils.checkpoint` with `use_reentrant=True`.'
    train = al.to_df().query('split=="train"').set_index('layer')
    assert train.loc[['a', 'b'], 'grad_std'].isna().all() and train.loc['head', 'grad_std'].notna().all()
    al, _ = fitted(Check(False), grads=True)
    assert al.to_df().query('split=="train"').grad_std.notna().all() and (al.to_df()['count'] == al.to_df().layer.map(dict(a=48, b=48, head=8))).all()


def test_a_frozen_body_has_no_gradients_and_that_is_no_fault():
    m = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2))
    m[0].requires_grad_(False)
    al, _ = fitted(m, grads=True)
    assert al.to_df().query('split=="train" and layer=="1"').grad_std.notna().all()


def test_a_parameter_returned_as_it_is_keeps_no_hook():
    class Token(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.randn(12))
        def forward(self): return self.w
    class M(nn.Module):
        def __init__(self): super().__init__(); self.token, self.head = Token(), nn.Linear(12, 2)
        def forward(self, x): return self.head(x+self.token())
    al, (said,) = fitted(m := M(), 12, 1, grads=True)
    assert not m.token.w._backward_hooks and said == 'Gradients of token are not recorded: they return a parameter as it is, which has its gradient in `.grad`.'
    assert al.to_df().query('layer=="token"')['std'].notna().all()


# ---- models that change within a fit

class Do(Callback):
    order = 50
    def __init__(self, **events):
        for k, f in events.items(): setattr(self, k, lambda f=f: f(self.learn))


def net(): return nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 2))


@pytest.mark.parametrize('ema', ['copy', 'AveragedModel'])
def test_an_average_of_the_weights_is_validated(ema):
    m, seen = net(), []
    twin = copy.deepcopy(m) if ema == 'copy' else torch.optim.swa_utils.AveragedModel(m)
    (twin if ema == 'copy' else twin.module)[0].weight.data.mul_(0).add_(7.)
    layer = (twin if ema == 'copy' else twin.module)[0]
    layer.register_forward_hook(lambda m, i, o: seen.append(o.double().numpy()))
    def swap(l): l.plain, l.model = l.model, twin
    def back(l): l.model = l.plain
    al, _ = fitted(m, 2, cbs=[Do(before_validate=swap, after_validate=back)], sample=None)
    df = al.to_df().query('split=="valid" and layer=="0"')
    assert len(df) == 12 and df['mean'].to_numpy() == pytest.approx([o.mean() for o in seen], rel=1e-5) and df['std'].to_numpy() == pytest.approx([o.std() for o in seen], rel=1e-5)
    assert al.to_df().query('split=="train"').groupby('layer').size().eq(12).all() and al.to_df().query('split=="valid"').groupby('layer').size().eq(12).all()
    fits = al.to_df().fit.max()
    al.learn.fit(1)
    assert al.to_df().fit.max() == fits+1       # it goes on, and does not start anew


def test_a_module_replaced_within_a_fit_is_recorded():
    m, seen = net(), []
    def replace(l):
        if l.train_iter != 3: return
        l.model[0] = nn.Linear(12, 12)
        l.model[0].register_forward_hook(lambda m, i, o: seen.append(o.detach().double().numpy()))
    al, _ = fitted(m, 2, cbs=[Do(after_batch=replace)], sample=None)
    df = al.to_df().query('layer=="0"')
    assert len(df) == 24 and len(seen) == 21
    for o in seen: assert np.abs(df['mean'].to_numpy()-o.mean()).min() < 1e-6
    al.learn.fit(1)
    assert al.to_df().fit.max() == 1


def test_a_model_of_another_kind_is_said_once():
    m, other = net(), nn.Sequential(nn.Linear(12, 2), nn.Identity())
    def swap(l): l.plain, l.model = l.model, other
    def back(l): l.model = l.plain
    al, (said,) = fitted(m, 2, 1, cbs=[Do(before_validate=swap, after_validate=back)])
    assert said.startswith('The model has changed within the fit: 1, 2 are in one of its forms only')
    assert set(al.to_df().query('split=="valid"').layer) == {'0'} and set(al.to_df().query('split=="train"').layer) == {'0', '1', '2'}


# ---- what the model does not call

def test_a_head_that_the_loss_calls_is_not_called_idle():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 2)
        def forward(self, x): return self.body(x)
    m = M()
    al, _ = fitted(m, loss=lambda p, y: F.cross_entropy(m.head(p), y))
    assert 'Never called by the model: head (unused, called by the loss, or its weights are used by another module' in al.summary()
    with pytest.raises(ValueError, match='since the model never called it: unused, called by the loss'): al.hist('head')


def test_nothing_recorded_after_a_fit_says_why():
    learn = get_learner(torch.jit.trace(net(), torch.randn(4, 12), check_trace=False), al := ActivationLogger(layers='0'))
    with pytest.raises(ValueError, match='call `learn.fit` first'): al.to_df()
    with pytest.warns(ActivationLoggerWarning, match='None of the 1 layers was seen to run'): learn.fit(1)
    for read in (al.to_df, al.summary, al.plot, lambda: al.stats):
        with pytest.raises(ValueError, match='Nothing is recorded: None of the 1 layers was seen to run.*traced'): read()
    def fail(l): raise RuntimeError('x')
    learn = get_learner(net(), al := ActivationLogger(), Do(before_train=fail))
    with pytest.raises(RuntimeError): learn.fit(1)
    with pytest.raises(ValueError, match='Nothing is recorded: no fit has come to the end of a batch'): al.to_df()


# ---- alerts

def test_an_embedding_whose_input_is_constant_is_not_dead():
    class Bert(nn.Module):
        def __init__(self): super().__init__(); self.word, self.kind, self.kw, self.head = nn.Linear(12, 12), nn.Embedding(2, 12), nn.Embedding(2, 12), nn.Linear(12, 2)
        def forward(self, x):
            ids = torch.zeros(len(x), 100, dtype=torch.long)
            return self.head(self.word(x)+self.kind(ids).mean(1)+self.kw(input=ids).mean(1))
    al, _ = fitted(m := Bert(), 4, sample=None)
    assert (al.to_df().query('layer in ("kind","kw") and split=="train"').dead == 1).all() and 'No alerts' in al.summary()
    al, _ = fitted(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2)), 4, x=torch.ones(24, 12))
    assert not any(a['cause'] == 'dead' and a['layer'] == '0' for a in al.found)


def test_a_layer_that_died_is_still_found():
    m = nn.Sequential(nn.Linear(12, 200), nn.ReLU(), nn.Linear(200, 200), nn.Linear(200, 2))
    with torch.no_grad(): m[0].bias.fill_(-1e3)
    al, (first, later) = fitted(m, 14, 2, layers='*[012]')
    assert first.startswith('Dead activations in 1 (ReLU)') and later.startswith('Dead activations in 2 (Linear)')


def test_what_starts_small_and_grows_has_not_shrunk():
    class Scale(nn.Module):
        def __init__(self): super().__init__(); self.gamma = nn.Parameter(torch.full((12,), 1e-7))
        def forward(self, x): return x*self.gamma
    class M(nn.Module):
        def __init__(self): super().__init__(); self.scale, self.head = Scale(), nn.Linear(12, 2)
        def forward(self, x): return self.head(x+self.scale(x))
    m = M()
    m.scale.gamma.requires_grad_(False)
    fitted(m, 3, cbs=[Do(after_batch=lambda l: l.model.scale.gamma.data.mul_(1.001))])
    def shrink(l): l.model.scale.gamma.data.mul_(.5)
    with torch.no_grad(): m.scale.gamma.fill_(1e-5)
    _, (said,) = fitted(m, 3, 1, cbs=[Do(after_batch=shrink)])
    assert 'have shrunk to' in said


def test_large_from_the_start_has_not_grown():
    al, (said,) = fitted(nn.Sequential(Out(lambda x: x*1e5), Out(lambda x: x/1e5), nn.Linear(12, 2)), 1, 1)
    assert said.startswith('Exploding activations in 0 (Out): its values are ') and '(root mean square)' in said
