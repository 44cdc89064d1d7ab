"Models that normalize their input by themselves: right input is silent, doubly normalized input is named, however the model is written."
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader as TorchDL, TensorDataset
from torchvision.transforms import v2 as T

from fastai.vision.all import DataLoaders, Learner, Normalize
from fastai_normx.all import StatsMatch, StatsMatchWarning, expected_stats, stats_match
from fastai_normx.inside import inside

I = (.485, .456, .406), (.229, .224, .225)
I255 = tuple(tuple(255*v for v in o) for o in I)


def column(v): return torch.tensor(v).view(-1, 1, 1)
def norm(x, mean, std): return (x-column(mean))/column(std)


def tiles(n=32, size=32):
    from sklearn.datasets import load_sample_images
    rng, ims = np.random.default_rng(0), load_sample_images().images
    at = [(ims[i % 2], rng.integers(0, 427-size), rng.integers(0, 640-size)) for i in range(n)]
    return torch.stack([torch.tensor(im[y:y+size, x:x+size]).permute(2, 0, 1) for im, y, x in at])


def body(): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


class OwnLayer(nn.Module):
    "A layer with a name of its own and its constants in a closure"
    def __init__(self, c): super().__init__(); self.f = lambda x: norm(x, *c)
    def forward(self, x): return self.f(x)


class InForward(nn.Module):
    "Arithmetic in place at the start of a forward"
    def __init__(self, c): super().__init__(); self.body, self.c = body(), c
    def forward(self, x):
        x = x.clone()
        x.sub_(column(self.c[0])).div_(column(self.c[1]))
        return self.body(x)


class Buffers(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.body = body()
        for name, v in zip(('shift', 'spread'), c): self.register_buffer(name, column(v))
    def forward(self, x): return self.body((x-self.shift)/self.spread)


class Parameters(Buffers):
    def __init__(self, c):
        nn.Module.__init__(self)
        self.body, self.shift, self.spread = body(), *(nn.Parameter(column(v), requires_grad=False) for v in c)


class Folded(nn.Module):
    "Multiplied and shifted, as a converter writes it"
    def __init__(self, c): super().__init__(); self.body, self.a, self.b = body(), 1/column(c[1]), -column(c[0])/column(c[1])
    def forward(self, x): return self.body(torch.addcmul(self.b, x, self.a))


def kornia_layer(c):
    enhance = pytest.importorskip('kornia.enhance')
    return nn.Sequential(enhance.Normalize(torch.tensor(c[0]), torch.tensor(c[1])), body())


models = dict(own=lambda c: nn.Sequential(OwnLayer(c), body()), resized=lambda c: nn.Sequential(nn.Sequential(T.Resize(24), T.Normalize(*c)), body()), forward=InForward,
              buffers=Buffers, parameters=Parameters, folded=Folded, kornia=kornia_layer, parallel=lambda c: nn.DataParallel(Buffers(c)),
              compiled=lambda c: torch.compile(Buffers(c), backend='eager'), timm=lambda c: nn.Sequential(OwnLayer(c), timm.create_model('resnet10t', num_classes=2)),
              vit=lambda c: nn.Sequential(OwnLayer(c), timm.create_model('vit_tiny_patch16_224', img_size=32, num_classes=2)))


def loader(x): return TorchDL(TensorDataset(x, torch.zeros(len(x)).long()), 16)


@pytest.mark.parametrize('name', models)
def test_found_by_behaviour(name):
    for c in (I, I255, ((.5,)*3, (.5,)*3)):
        model = models[name](c)
        found = inside(model, torch.rand(4, 3, 32, 32)).map
        np.testing.assert_allclose(found.mean, c[0], rtol=1e-3)
        np.testing.assert_allclose(found.std, c[1], rtol=1e-3)


@pytest.mark.parametrize('name', models)
def test_right_input_is_silent_and_double_is_named(name):
    x, model = tiles()/255, models[name](I)
    with warnings.catch_warnings():
        warnings.simplefilter('error', StatsMatchWarning)
        assert stats_match(loader(x), 'resnet18', model=model).outcome == 'ok'
        assert stats_match(loader(255*x), 'resnet18', model=models[name](I255)).outcome == 'ok'
    r = stats_match(loader(norm(x, *I)), 'resnet18', model=model, warn=False)
    assert r.kind == 'in_model' and "before the model (ImageNet's constants) and again inside it (ImageNet's constants)" in r.findings[0].message
    assert 'leave out the one before the model' in r.findings[0].fix
    assert stats_match(loader(255*x), 'resnet18', model=model, warn=False).kind == 'wrong_range'
    assert stats_match(loader(x), 'resnet18', model=models[name](I255), warn=False).outcome == 'mismatch'


def test_a_layer_that_rescales_only():
    "Rescaling inside, and the constants before it on 0-255, as Keras' models have it"
    class Rescale(nn.Module):
        def forward(self, x): return x/255
    x, model = tiles().float(), nn.Sequential(Rescale(), body())
    assert stats_match(loader(norm(x/255, *I)*255), 'resnet18', model=model).ok
    assert stats_match(loader(norm(x/255, *I)), 'resnet18', model=model, warn=False).kind == 'wrong_range'


@pytest.mark.parametrize('name', ['own', 'forward', 'buffers'])
def test_learner_and_callback(name, photo_dls):
    learn = Learner(photo_dls(), models[name](I), loss_func=nn.CrossEntropyLoss())
    def said():
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            learn.fit(1, 1e-3, cbs=StatsMatch('resnet18'))
        return [str(w.message) for w in ws if issubclass(w.category, StatsMatchWarning)]
    assert said() == [] and learn.stats_match('resnet18').ok
    learn.dls.normalize_for('resnet18')
    message, = said()
    assert 'again inside it' in message
    r = learn.stats_match('resnet18', warn=False)
    assert r.kind == 'in_model'
    exec(r.findings[0].code, dict(learn=learn))
    assert said() == [] and learn.stats_match('resnet18').ok


def test_the_model_alone_says_what_it_expects():
    "Nobody names the backbone: what the wrapper applies are its constants"
    model = Buffers(I)
    assert tuple(stats_match(loader(tiles()/255), model=model).expected) == ((0.,)*3, (1.,)*3)
    r = stats_match(loader(norm(tiles()/255, *I)), model=model, warn=False)
    assert r.kind == 'in_model' and 'the model, which normalizes inside' in r.findings[0].details


def test_each_image_by_itself_cannot_be_told():
    class PerImage(nn.Module):
        def forward(self, x): return (x-x.mean((1, 2, 3), keepdim=True))/x.std((1, 2, 3), keepdim=True)
    r = stats_match(loader(tiles()/255), 'resnet18', model=nn.Sequential(PerImage(), body()))
    assert r.outcome == 'cannot tell' and 'by no constants' in r.reason


def test_nothing_inside_is_nothing():
    for m in (body(), timm.create_model('resnet10t'), nn.Sequential(T.Resize(24), body())): assert inside(m, torch.rand(2, 3, 32, 32)) is None
    assert stats_match(loader(tiles()/255), 'resnet18', model=body(), warn=False).kind == 'not_normalized'
