"`stats_match` and `StatsMatch` on learners, loaders, files and bad input; the lessons are in nbs/03_match.ipynb and nbs/03b_evidence.ipynb."
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchDL, TensorDataset
from torchvision import models as M, transforms as T

from fastai.vision.all import (Callback, CutMix, DataLoaders, GradientAccumulation, Learner, MixUp, Normalize, TensorImage, aug_transforms, imagenet_stats,
                               load_learner, set_seed, unet_learner, vision_learner, xresnet18)
from fastai_normx.all import ChannelStats, MatchReport, StatsMatch, StatsMatchWarning, expected_stats, stats_match
from fastai_normx.constants import Affine
from fastai_normx.expected import ExpectedStatsWarning
from fastai_normx.harm import harm
from fastai_normx.stats import DataStatsWarning

I, H = imagenet_stats, ((.5,)*3, (.5,)*3)


def tiles(n=64, size=32):
    from sklearn.datasets import load_sample_images
    rng, ims = np.random.default_rng(0), load_sample_images().images
    at = [(ims[i % 2], rng.integers(0, 427-size), rng.integers(0, 640-size)) for i in range(n)]
    return torch.stack([torch.tensor(im[y:y+size, x:x+size]).permute(2, 0, 1) for im, y, x in at])


def norm(x, mean, std): return (x-torch.tensor(mean).view(-1, 1, 1))/torch.tensor(std).view(-1, 1, 1)
def loader(x, bs=16): return TorchDL(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), bs)
def kind(data, expected='resnet18', **kw): return stats_match(data, expected, warn=False, **kw).kind


@contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('error', StatsMatchWarning)
        yield


def ours(ws): return [str(w.message) for w in ws if issubclass(w.category, StatsMatchWarning)]


@pytest.fixture
def learner(offline_weights, photo_dls):
    "A `vision_learner` with the given `Normalize` constants, and what it says in `fit`"
    def make(*tfms, arch=M.resnet18, make=vision_learner, bs=4, **kw):
        return make(photo_dls(*tfms, bs=bs), arch, normalize=False, **kw)
    return make


def fit(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.fit(n, 1e-4, **kw)
    return ours(ws)


# --- what was done to the pixels ---------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(.05, 1)), min_size=3, max_size=3), st.sampled_from([I, H, ((0.,)*3, (1.,)*3)]))
def test_any_constants_on_photographs(c, E):
    c = tuple(zip(*c))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        E = expected_stats(E)
    r = stats_match(norm(tiles(24)/255, *c), E, warn=False)
    if Affine(*c).same(E, .0199): assert r.outcome == 'ok'
    elif not Affine(*c).same(E, .0201): assert r.outcome != 'ok', r


@pytest.mark.parametrize('E', ['resnet18', 'tf_efficientnet_lite0', 'vit_base_patch32_clip_224.openai', 'dpn68', 'fastvit_mci0.apple_mclip'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_right_is_never_a_mismatch(E, dtype):
    s = expected_stats(E)
    for n in (1, 2, 8, 64):
        with quiet(): r = stats_match(norm(tiles(n)/255, *s).to(dtype), E)
        assert r.outcome != 'mismatch' and all(f.severity == 'note' for f in r.findings)


def test_harm_is_a_share_and_grows():
    E = expected_stats('resnet18')
    shares = [harm(E, (E.mean, [s*f for s in E.std])) for f in (1, .8, .5, .2, .01)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    grey = expected_stats('resnet18', n_in=1)
    assert 0 < harm(grey, ((0.,), (1.,))) < 1


def test_more_and_fewer_channels():
    four = expected_stats('resnet18', n_in=4, extra=((.3,), (.2,)))
    x = torch.cat([tiles(), tiles()[:, :1]], 1)
    with quiet(): assert stats_match(norm(x/255, *four), four).outcome == 'ok'
    assert kind(norm(x/255, *four)) == 'channel_count' and kind(x/255, four) == 'not_normalized'
    one = expected_stats('resnet18', n_in=1)
    with quiet(): assert stats_match(norm(tiles()[:, 1:2]/255, *one), one).outcome == 'ok'
    assert 'n_in=1' in stats_match(norm(tiles()[:, 1:2]/255, *one), 'resnet18', warn=False).findings[0].fix
    assert kind(norm(tiles()/255, *I).permute(0, 2, 3, 1)) == 'channel_count'


def test_batches_that_change_their_channels():
    assert kind([norm(tiles(8)/255, *I), norm(tiles(8)/255, *I)[:, :1]]) == 'channel_count'


def test_everything_is_nan():
    r = stats_match(torch.full((8, 3, 16, 16), torch.nan), 'resnet18', warn=False)
    assert r.kind == 'non_finite' and 'nan' in str(r).lower()


# --- the report --------------------------------------------------------------------------------------------------------

def test_warning_names_everything_and_points_here():
    with pytest.warns(StatsMatchWarning) as ws: stats_match(loader(tiles()/255), 'resnet18')
    w, = [w for w in ws if issubclass(w.category, StatsMatchWarning)]
    assert w.filename == __file__
    for part in ('not normalized', 'resnet18.a1_in1k', "ImageNet's constants", 'points of accuracy', 'transforms.Normalize((0.485'): assert part in str(w.message)
    with pytest.warns(StatsMatchWarning): details = stats_match(loader(tiles()/255), 'resnet18').findings[0].details
    for part in ('resnet18.a1_in1k (timm', 'mean (0.485, 0.456, 0.406)', 'read off the values (confidence 0.9'): assert part in details


def test_report_as_text_html_frame_and_plot():
    import matplotlib; matplotlib.use('Agg')
    for data in (tiles()/255, ChannelStats.of(tiles()), norm(tiles()/255, *I)[:, :1]):
        r = stats_match(data, 'resnet18', warn=False)
        assert isinstance(r, MatchReport) and repr(r) == str(r) and r.findings[0].message.split()[0] in r._repr_html_()
        assert len(r.to_df()) == len(r.observed.mean) == len(r.plot().axes)
    assert '<' not in r.findings[0].message or '&lt;' in r._repr_html_()


def test_raw_undoes_what_was_applied():
    x = tiles()
    r = stats_match(loader(norm(norm(x/255, *I), *H)), 'resnet18', warn=False)
    assert r.kind == 'normalized_twice' and torch.allclose(r.raw.mean, (x.double()/255).mean((0, 2, 3)), atol=1e-4)


def test_model_measures_the_cost_and_is_left_alone():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    m[1].eval()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    r = stats_match(tiles(32)/255, 'resnet18', model=m, warn=False)
    assert m.training and not m[1].training and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    with torch.no_grad(): a, b = (m.eval()(o) for o in (tiles(32)/255, norm(tiles(32)/255, *I)))
    assert r.impact['n'] == 32 and r.impact['changed'] == pytest.approx((a.argmax(1) != b.argmax(1)).float().mean().item())
    assert r.impact['cosine_distance'] == pytest.approx((1-nn.functional.cosine_similarity(a, b)).mean().item(), abs=1e-5)


def test_reports_on_files(tmp_path):
    for i, t in enumerate(tiles(40)): Image.fromarray(t.permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    with quiet(): r = stats_match(tmp_path, 'resnet18')
    assert r.outcome == 'ok' and len(r.observed) == 40 and 'before any pipeline' in r.applied.source
    with quiet(): assert len(stats_match(sorted(tmp_path.iterdir()), 'resnet18', n_items=7).observed) == 7
    (tmp_path/'torn.png').write_bytes(b'nothing')
    with pytest.warns(DataStatsWarning, match='torn.png'): stats_match(tmp_path, 'resnet18')
    for i in range(40): (tmp_path/f'{i}.png').unlink()
    with pytest.raises(ValueError, match='none of the 1'): stats_match(tmp_path, 'resnet18')


# --- learners ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch', [M.resnet18, M.convnext_tiny], ids=['BatchNorm', 'LayerNorm'])
def test_learner_right_wrong_and_mended(learner, arch):
    make_learner = learner
    learn = learner(Normalize.from_stats(*I), arch=arch)
    with quiet():
        assert learn.stats_match().outcome == 'ok'
        assert fit(learn, cbs=StatsMatch()) == []
    learn = learner(*aug_transforms(), arch=arch)
    said = fit(learn, 2, cbs=(cb := StatsMatch()))
    assert len(said) == 1 and 'not normalized' in said[0] and '`learn.dls.normalize_for(learn)`' in said[0]
    assert cb.report.kind == 'not_normalized' and not learn.model._forward_pre_hooks
    with pytest.warns(StatsMatchWarning, match='keep them'): learn.stats_match()
    with pytest.warns(ExpectedStatsWarning, match='Train it further'): learn.dls.normalize_for(learn)
    assert fit(learn, cbs=StatsMatch()) == [] and learn.stats_match().ok
    with pytest.warns(StatsMatchWarning): r = (learn := make_learner(*aug_transforms(), arch=arch)).stats_match()
    assert r.fix() is learn.dls and learn.stats_match().ok


def test_unet(learner):
    learn = learner(Normalize.from_stats(*H), make=unet_learner, n_out=2, loss_func=lambda p, y: p.mean())
    assert [s[:40] for s in fit(learn, cbs=StatsMatch())] == ['The images are normalized with the const']


def test_second_learner_on_the_same_loaders(learner, offline_weights):
    learn = learner(Normalize.from_pretrained('resnet18'))
    assert 'constants' in fit(vision_learner(learn.dls, M.googlenet, normalize=False), cbs=StatsMatch('tf_efficientnet_lite0'))[0]


@pytest.mark.parametrize('cb', [MixUp, CutMix, lambda: GradientAccumulation(8)], ids=['MixUp', 'CutMix', 'GradientAccumulation'])
def test_training_callbacks_raise_no_alarm(learner, cb):
    with quiet(): assert fit(learner(Normalize.from_stats(*I)), 2, cbs=[cb(), StatsMatch()]) == []
    assert len(fit(learner(), 2, cbs=[cb(), StatsMatch()])) == 1


def test_training_is_the_same_with_and_without(learner):
    def losses(*cbs):
        learn = learner(Normalize.from_stats(*H), *aug_transforms())
        set_seed(3, reproducible=True)
        learn.dls.train.rng.seed(3)
        fit(learn, 2, cbs=cbs)
        return [float(l) for l in learn.recorder.losses]
    assert losses() == losses(StatsMatch())


def test_examining_a_learner_changes_nothing(learner):
    learn = learner(Normalize.from_stats(*I), cbs=[MixUp(), StatsMatch()])
    learn.model.eval()
    cbs, rng, before, was = list(learn.cbs), learn.dls.train.rng.getstate(), torch.get_rng_state(), learn.training
    learn.stats_match()
    assert list(learn.cbs) == cbs and learn.dls.train.rng.getstate() == rng and torch.equal(torch.get_rng_state(), before)
    assert not learn.model.training and learn.training == was


def test_quiet_in_lr_find_and_get_preds(learner):
    learn = learner(cbs=StatsMatch())
    with quiet(), learn.no_bar():
        learn.lr_find(num_it=30, show_plot=False)
        learn.get_preds()
        learn.predict(np.asarray(tiles(1)[0].permute(1, 2, 0)))
    assert learn.stats_match_cb.report is None and len(fit(learn)) == 1


def test_half_the_input_is_normalized_by_a_callback(learner):
    class Twice(Callback):
        def before_batch(self): self.learn.xb = (norm(self.xb[0], *I),)
    learn = learner(Normalize.from_stats(*I), cbs=[Twice(), StatsMatch()])
    said, = fit(learn)
    assert said.startswith('The images are normalized twice, both times with ImageNet') and '`Twice` changes the images before the model: take that out' in said
    assert learn.stats_match(warn=False).kind == 'normalized_twice'
    with pytest.raises(ValueError, match='`fix` changes nothing here'): learn.stats_match(warn=False).fix()


def test_split_mismatch_is_found_in_training(learner):
    learn = learner(Normalize.from_stats(*I), cbs=StatsMatch())
    dl = learn.dls.valid
    dl.after_batch.fs = dl.after_batch.fs.filter(lambda t: not isinstance(t, Normalize))
    said = fit(learn)
    assert learn.stats_match_cb.report.kind == 'split_mismatch' and any(s.startswith('The sets are normalized differently') for s in said)


def test_trouble_inside_is_said_once(learner, monkeypatch):
    import fastai_normx.match as match
    monkeypatch.setattr(match, 'judge', lambda *a, **k: 1/0)
    learn = learner(Normalize.from_stats(*I))
    cb = StatsMatch()
    said = fit(learn, 2, cbs=cb) + fit(learn, cbs=cb)
    assert len(said) == 1 and 'ZeroDivisionError' in said[0] and 'training goes on' in said[0]


def printed(learn, capsys, **kw):
    "The warnings and the printed sentences of a fit"
    capsys.readouterr()
    with learn.no_bar(), warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        learn.fit(1, 1e-4, **kw)
    return ours(ws), [l for l in capsys.readouterr().out.splitlines() if 'StatsMatch' in l]


def test_random_weights_expect_nothing(photo_dls, capsys):
    learn = vision_learner(photo_dls(), M.resnet18, pretrained=False)
    with pytest.raises(ValueError, match='pretrained=False: random weights expect no constants'): learn.stats_match()
    said, notes = printed(learn, capsys, cbs=StatsMatch())
    assert not said and len(notes) == 1 and 'pretrained=False' in notes[0] and 'Normalize.from_data(dls)' in notes[0]
    said, notes = printed(learn, capsys, cbs=StatsMatch(I))
    assert len(said) == 1 and 'not normalized' in said[0] and not notes


@pytest.mark.parametrize('make', [lambda: timm.create_model('resnet18', num_classes=2), lambda: timm.create_model('convnext_atto', num_classes=2), lambda: xresnet18(n_out=2)],
                         ids=['timm BatchNorm', 'timm LayerNorm', 'xresnet'])
def test_random_weights_of_a_plain_learner(photo_dls, capsys, make):
    "`timm.create_model` without `pretrained=True` still carries the config of the pretrained weights"
    learn = Learner(photo_dls(), make(), loss_func=nn.CrossEntropyLoss(), cbs=StatsMatch())
    said, notes = printed(learn, capsys)
    assert not said and len(notes) == 1 and 'as they were initialized' in notes[0]
    assert printed(learn, capsys)[1] == []
    with pytest.raises(ValueError, match='random weights expect no constants'): Learner(photo_dls(), make(), loss_func=nn.CrossEntropyLoss()).stats_match()


def test_no_images_no_alarm(capsys):
    x = torch.randn(32, 5)
    learn = Learner(DataLoaders(loader(x), loader(x)), nn.Linear(5, 2), loss_func=nn.CrossEntropyLoss(), cbs=StatsMatch())
    said, notes = printed(learn, capsys)
    assert not said and len(notes) == 1 and 'no batch of images among the inputs of Linear' in notes[0]


def test_what_cannot_be_told_is_said_once_a_fit(capsys):
    x = torch.nn.functional.interpolate(tiles()/255*.5+.2, size=48, mode='bilinear')
    learn = Learner(DataLoaders(loader(norm(x, *I)), loader(norm(x, *I))), nn.Sequential(nn.Flatten(), nn.Linear(3*48*48, 2)), loss_func=nn.CrossEntropyLoss())
    said, notes = printed(learn, capsys, cbs=StatsMatch('resnet18'))
    assert not said and len(notes) == 1 and notes[0].startswith('StatsMatch cannot tell') and 'would tell' in notes[0]
    with learn.no_logging(): assert printed(learn, capsys, cbs=StatsMatch('resnet18')) == ([], [])


def test_two_callbacks_say_it_once(learner):
    learn = learner(cbs=StatsMatch(I))
    assert len(fit(learn, cbs=[StatsMatch(I)])) == 1


def test_a_certain_fault_is_told_before_the_first_step(learner):
    class First(Callback):
        def before_step(self): raise KeyboardInterrupt
    learn = learner(bs=16)
    with pytest.raises(KeyboardInterrupt), pytest.warns(StatsMatchWarning, match='not normalized'), learn.no_bar(): learn.fit(1, cbs=[StatsMatch(I), First()])


@pytest.mark.parametrize('bs', [4, 32])
def test_one_brightness_for_a_batch_is_no_fault(photo_dls, bs):
    "The constants read off such a batch include the factor"
    class Dim(Callback):
        def before_batch(self): self.learn.xb = (self.xb[0]*float(np.random.default_rng(self.iter).uniform(.7, 1)),)
    x = norm(tiles(128)/255, *I)
    learn = Learner(DataLoaders(loader(x, bs), loader(x, bs)), nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 2)), loss_func=nn.CrossEntropyLoss(), cbs=[Dim(), StatsMatch('resnet18')])
    assert fit(learn) == []


def test_inputs_that_are_no_images():
    x = torch.randn(32, 5)
    learn = Learner(DataLoaders(loader(x), loader(x)), nn.Linear(5, 2), loss_func=nn.CrossEntropyLoss(), cbs=StatsMatch('resnet18'))
    said = fit(learn)
    assert len(said) == 1 and 'no batch of images among the inputs of Linear' in said[0]


def test_several_inputs_and_dict_outputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.c, self.l = nn.Conv2d(3, 4, 3), nn.Linear(5, 2)
        def forward(self, table, im): return dict(out=self.l(table)+self.c(im).mean())
    x = norm(tiles()/255, *I)
    dl = TorchDL(TensorDataset(torch.randn(64, 5), x, torch.zeros(64, dtype=torch.long)), 16)
    learn = Learner(DataLoaders(dl, dl), Two(), loss_func=lambda p, y: nn.functional.cross_entropy(p['out'], y))
    learn.dls.n_inp = 2
    assert fit(learn, cbs=StatsMatch('resnet18')) == []
    assert 'with ImageNet' in fit(learn, cbs=StatsMatch('tf_efficientnet_lite0'))[0]
    assert learn.stats_match('resnet18').ok


def test_an_exception_in_training_leaves_no_trace(learner):
    class Boom(Callback):
        order = 60
        def before_batch(self):
            if self.training: raise ValueError('boom')
    learn = learner(Normalize.from_stats(*I), cbs=StatsMatch())
    with pytest.raises(ValueError), learn.no_bar(): learn.fit(1, cbs=Boom())
    learn.model(torch.zeros(2, 3, 32, 32).to(learn.dls.device))
    assert not learn.model._forward_pre_hooks
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, Boom)])
    assert fit(learn) == []


def test_warnings_as_errors_stop_training(learner):
    learn = learner(cbs=StatsMatch())
    with pytest.raises(Exception, match='not normalized'), warnings.catch_warnings(), learn.no_bar():
        warnings.simplefilter('error', StatsMatchWarning)
        learn.fit(1)


def test_exported_with_the_callback(learner, tmp_path):
    learn = learner(Normalize.from_stats(*I), cbs=StatsMatch())
    fit(learn)
    assert learn.stats_match_cb.report.ok
    learn.export(tmp_path/'e.pkl')
    assert (tmp_path/'e.pkl').stat().st_size < 60e6
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = load_learner(tmp_path/'e.pkl')
    with other.no_bar(): other.predict(np.asarray(tiles(1)[0].permute(1, 2, 0)))
    assert not hasattr(other.cbs, 'stats_match_cb') and not [cb for cb in other.cbs if isinstance(cb, StatsMatch)]


def test_only_the_first_process_speaks(learner, monkeypatch):
    import fastai_normx.match as match
    monkeypatch.setattr(match, 'rank_distrib', lambda: 1)
    assert fit(learner(), cbs=StatsMatch()) == []


def test_a_normalize_that_does_not_act():
    "fastai's `Normalize` passes a plain tensor through"
    from fastai.data.all import TfmdDL, Datasets
    x = tiles()/255
    dls = Datasets(range(64), [[lambda i: x[i]], [lambda i: i % 2]]).dataloaders(bs=16, after_batch=[Normalize.from_stats(*I)], num_workers=0)
    assert not isinstance(dls.one_batch()[0], TensorImage)
    assert dls.stats_match('resnet18', warn=False).kind == 'not_normalized'


def test_compiled_model(learner):
    learn = learner()
    learn.model = torch.compile(learn.model, backend='eager')
    assert len(fit(learn, cbs=StatsMatch(I))) == 1


def test_images_named_in_a_data_frame(tmp_path):
    import pandas as pd
    from fastai.vision.all import ImageDataLoaders
    from fastai_normx.pipeline import testimony
    for i, t in enumerate(tiles(24)): Image.fromarray(t.permute(1, 2, 0).numpy()).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(name=[f'{i}.png' for i in range(24)], label=['a', 'b']*12))
    dls = ImageDataLoaders.from_df(df, tmp_path, bs=8, num_workers=0, batch_tfms=[Normalize.from_stats(*I)])
    assert testimony(dls.train, 3).rgb and dls.stats_match('resnet18').ok
    assert dls.stats_match('tf_efficientnet_lite0', warn=False).fix() is dls and dls.stats_match('tf_efficientnet_lite0').ok


def test_the_fix_for_a_model_that_normalizes_inside(photo_dls):
    from fastai_normx.expected import NormStats
    from torchvision.transforms import v2
    dls = photo_dls(Normalize.from_stats(*I))
    model = nn.Sequential(v2.Normalize(*I), nn.Conv2d(3, 8, 3), nn.Flatten(1))
    r = dls.stats_match('resnet18', model=model, warn=False)
    assert r.kind == 'in_model' and tuple(r.expected) == ((0., 0., 0.), (1., 1., 1.))
    r.fix()
    assert dls.stats_match('resnet18', model=model).ok


# --- what a first user ran into ----------------------------------------------------------------------------------------

def test_an_exported_learner_holds_no_images(learner, tmp_path):
    learner(Normalize.from_stats(*I)).export(tmp_path/'e.pkl')
    learn = load_learner(tmp_path/'e.pkl')
    for f in (lambda: learn.stats_match(I), lambda: learn.dls.stats_match(I)):
        with pytest.raises(ValueError, match='hold no items, as those of an exported learner'): f()


def test_fix_where_normalize_does_not_act():
    "Plain tensors in fastai loaders: `normalize_for` would change nothing"
    ds = TensorDataset(tiles(32)/255, torch.zeros(32).long())
    r = stats_match(DataLoaders.from_dsets(ds, ds, bs=8), 'resnet18', warn=False)
    assert r.kind == 'not_normalized' and 'transforms.Normalize((0.485, 0.456, 0.406)' in r.findings[0].fix and 'normalize_for' not in r.findings[0].fix
    with pytest.raises(ValueError, match='changes nothing'): r.fix()


def test_a_fault_that_comes_back_is_told_again(learner):
    learn = learner(Normalize.from_stats(*I), cbs=StatsMatch())
    def said(c): learn.dls.normalize_for(c); return len(fit(learn))
    assert [said(c) for c in (I, H, H, I, H)] == [0, 1, 0, 0, 1]


def test_one_set_does_not_clear_what_both_showed(learner):
    learn = learner(Normalize.from_stats(*I), cbs=StatsMatch())
    dl = learn.dls.valid
    dl.after_batch.fs = dl.after_batch.fs.filter(lambda t: not isinstance(t, Normalize))
    assert fit(learn) and not fit(learn)


@pytest.mark.parametrize('n', [0, -1, 2.5, 'x'])
def test_n_items_of_the_callback(n):
    with pytest.raises(ValueError, match='`n_items` is a number of images above 0'): StatsMatch(n_items=n)


def test_report_counts_the_images_of_all_sets(learner):
    r = learner(Normalize.from_stats(*I)).stats_match(warn=False)
    n = sum(map(len, (v.stats for v in r.views.values())))
    assert len(r.views) == 2 and f'({n} images' in str(r) and f'({n} images' in r._repr_html_()


# --- messages ----------------------------------------------------------------------------------------------------------

def faulty():
    "A report for each kind of fault, through a loader and through a learner's pipeline"
    x = tiles(64)/255
    twin = nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    twin.register_forward_pre_hook(lambda m, args: (norm(args[0], *I),))
    hole, many = norm(x, *I), norm(x, *I)
    hole[0, 0, 0, 0] = torch.nan
    for E in ('resnet18', 'tf_efficientnet_lite0.in1k', 'vit_base_patch32_clip_224.openai'):
        c = expected_stats(E)
        data = dict(none=x, other=norm(x, (.3, .4, .5), (.2, .3, .4)), half=norm(x, *H), imagenet=norm(x, *I), twice=norm(norm(x, *c), *c), bytes=255*x, twice255=norm(x/255, *c),
                    bgr=norm(x, c.mean[::-1], c.std[::-1]), grey=x[:, :1], nan=hole, clipped=norm(x, *c).clamp(0, 1), black=0*x, twelve=norm(x*255*16/65535, *c), noise=torch.randn(64, 3, 8, 8)*9)
        for k, v in data.items(): yield k, stats_match(loader(v), E, warn=False)
        yield 'sets', stats_match(DataLoaders(loader(norm(x, *c)), loader(x)), E, warn=False)
        yield 'one by one', stats_match(loader((x-x.mean((2, 3), keepdim=True))/x.std((2, 3), keepdim=True)), E, warn=False)
        yield 'inside', stats_match(loader(norm(x, *c)), E, model=nn.Sequential(Inside(c), nn.Conv2d(3, 8, 3)), warn=False)


class Inside(nn.Module):
    def __init__(self, c): super().__init__(); self.c = tuple(c)
    def forward(self, x): return norm(x, *self.c)


def test_a_warning_is_short():
    "Cause, cost and fix in at most 40 words; the rest is in the report"
    kinds = set()
    for name, r in faulty():
        for f in r.findings:
            if f.severity == 'note': continue
            kinds.add(f.kind)
            assert len(str(f).split()) <= 40, (len(str(f).split()), name, str(f))
            assert 'fine-tuned' not in str(f)
    assert kinds == {'not_normalized', 'wrong_stats', 'normalized_twice', 'wrong_range', 'channel_order', 'channel_count', 'non_finite', 'constant_channel', 'split_mismatch', 'in_model'}


@pytest.mark.parametrize('fix', [False, True])
def test_a_name_stands_for_grey_where_model_and_images_are_grey(fix):
    "`StatsMatch('name')` and `stats_match('name')` on a learner with n_in=1, without saying `n_in` again; and with three channels nothing of it"
    from fastai.vision.all import IntToFloatTensor, TensorCategory, vision_learner
    arch = 'tf_efficientnet_lite0'
    x = [(TensorImage(torch.randint(0, 256, (1, 32, 32), dtype=torch.uint8)), TensorCategory(i%2)) for i in range(48)]
    normalize = Normalize.from_stats([.2], [.3], cuda=False) if fix else Normalize.from_pretrained(arch, n_in=1, cuda=False)
    dls = DataLoaders.from_dsets(x, x, bs=16, num_workers=0, device='cpu', after_batch=[IntToFloatTensor(), normalize])
    learn = vision_learner(dls, arch, n_in=1, n_out=2, normalize=False, pretrained=False, loss_func=nn.CrossEntropyLoss(), cbs=StatsMatch(arch, fix=fix))
    learn.pretrained = True
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('error', StatsMatchWarning)
        learn.validate()
        assert learn.stats_match(arch).ok and learn.stats_match_cb.report.outcome != 'mismatch'
    assert expected_stats(dls).mean == pytest.approx((.5,))
