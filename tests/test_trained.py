"A learner that has trained under some constants: what is said of it, what `fix` does, and what is shipped."
import copy, subprocess, sys, tempfile, warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import *  # lr_find, fit_one_cycle
from fastai.data.core import Datasets
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorCategory, TensorImage

from fastai_normx.all import StatsMatch, StatsMatchWarning, applied_stats, expected_stats, stats_match
from fastai_normx.expected import ExpectedStatsWarning
from fastai_normx.trained import has_trained, trained_with

imagenet, half = ((.485, .456, .406), (.229, .224, .225)), ((.5,)*3, (.5,)*3)


def image(i): return TensorImage(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(i)))

def label(i): return TensorCategory(torch.tensor(i % 2))

def loaders(stats, n=24):
    tfms = [IntToFloatTensor()] + ([Normalize.from_stats(*stats, cuda=False)] if stats else [])
    return Datasets(range(n), [[image], [label]], splits=[range(16), range(16, n)]).dataloaders(bs=8, after_batch=tfms, num_workers=0, device='cpu')

def learner(stats, cbs=None):
    "A learner whose backbone expects 0.5 / 0.5"
    import timm
    torch.manual_seed(0)
    net = timm.create_model('test_vit.r160_in1k', pretrained=False, num_classes=2, img_size=32)
    learn = Learner(loaders(stats), net, loss_func=nn.CrossEntropyLoss(), cbs=cbs, path=tempfile.mkdtemp())
    learn.arch, learn.pretrained = 'test_vit.r160_in1k', True
    return learn

def quietly(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)

def close(a, b): return all(torch.allclose(torch.tensor(x), torch.tensor(y)) for x, y in zip(a, b))


@pytest.fixture
def trained():
    learn = learner(imagenet, StatsMatch())
    quietly(learn, learn.fit, 1)
    return learn


def test_a_new_learner_is_told_to_mend_before_training():
    learn = learner(imagenet)
    with pytest.warns(StatsMatchWarning, match='before you train'): r = learn.stats_match()
    r.fix()
    assert close(applied_stats(learn), half) and learn.stats_match().ok

def test_a_trained_learner_is_told_to_keep(trained):
    with pytest.warns(StatsMatchWarning, match='has trained with ImageNet') as seen: r = trained.stats_match()
    assert 'keep them' in str(seen[0].message) and 'normalize_for(learn)' not in str(seen[0].message)
    assert (r.outcome, r.kind, r.findings[0].severity, r.findings[0].code) == ('mismatch', 'wrong_stats', 'warning', '')
    with pytest.raises(ValueError, match='changes nothing'): r.fix()
    assert close(applied_stats(trained), imagenet)

def test_what_is_shipped_is_what_was_applied(trained, tmp_path):
    shipped = expected_stats(applied_stats(trained).save(tmp_path))
    assert close(shipped, imagenet) and close(expected_stats(trained), half)
    assert trained.stats_match(shipped, warn=False).ok  # whoever says what he means hears nothing

def test_a_change_after_training_is_noticed(trained):
    with pytest.warns(ExpectedStatsWarning, match='has trained with mean .0.485'): trained.dls.normalize_for(trained)
    with pytest.warns(StatsMatchWarning, match='as .* expects, but this learner has trained'): r = trained.stats_match()
    assert r.findings[0].severity == 'error'
    r.fix()
    assert close(applied_stats(trained), imagenet)

def test_any_other_constants_are_a_fault_against_what_was_learned(trained):
    trained.dls.normalize_for(((.3,)*3, (.9,)*3))
    r = trained.stats_match(warn=False)
    assert r.findings[0].severity == 'error' and '(0.485, 0.456, 0.406)' in r.findings[0].code
    exec(r.findings[0].code, dict(learn=trained))
    assert close(applied_stats(trained), imagenet)

def test_sets_that_differ_after_training(trained):
    trained.dls.valid.after_batch.fs = trained.dls.valid.after_batch.fs.filter(lambda t: not isinstance(t, Normalize))
    remembered = trained_with(trained)
    assert close(remembered, imagenet)
    r = trained.stats_match(warn=False)
    assert r.kind == 'split_mismatch'
    r.fix()
    assert close(applied_stats(trained), imagenet)

def test_training_further_with_the_right_ones_makes_them_right(trained):
    quietly(trained, trained.dls.normalize_for, trained)
    quietly(trained, trained.fit, 1)
    assert trained.stats_match().ok

def test_right_from_the_start_stays_right():
    learn = learner(half, StatsMatch())
    with warnings.catch_warnings():
        warnings.simplefilter('error', StatsMatchWarning)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2)
            learn.fit(1)
        assert learn.stats_match().ok


def test_lr_find_is_not_training():
    learn = learner(imagenet, StatsMatch())
    quietly(learn, learn.lr_find, show_plot=False)
    assert not has_trained(learn) and trained_with(learn) is None and not hasattr(learn, 'norm_trained')

def test_lr_find_after_unfreeze_forgets_nothing(trained):
    trained.unfreeze()
    quietly(trained, trained.lr_find, show_plot=False)
    assert close(trained_with(trained), imagenet)

@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('x'), CancelFitException])
def test_a_fit_that_was_cut_off_has_trained(error):
    class Stop(Callback):
        def after_step(self): raise error
    learn = learner(imagenet, [StatsMatch(), Stop()])
    try: quietly(learn, learn.fit, 1)
    except (KeyboardInterrupt, ValueError): pass
    assert has_trained(learn) or error is not None and not learn.recorder.losses
    quietly(learn, learn.validate)
    learn.remove_cb(Stop)
    quietly(learn, learn.fit, 1)
    assert close(trained_with(learn), imagenet)

def test_no_step_is_no_training():
    class Stop(Callback):
        def before_batch(self): raise CancelFitException
    learn = learner(imagenet, [StatsMatch(), Stop()])
    quietly(learn, learn.fit, 1)
    assert trained_with(learn) is None

def test_weights_that_were_random_expect_what_they_were_trained_with():
    learn = learner(imagenet)
    learn.pretrained = False
    with pytest.raises(ValueError, match='random weights'): learn.stats_match()
    quietly(learn, learn.fit, 1)
    assert learn.stats_match().ok
    learn.dls.valid.after_batch.normalize.mean = learn.dls.valid.after_batch.normalize.mean + 1
    assert not learn.stats_match(imagenet, warn=False).ok

def test_an_exported_learner_keeps_what_it_has(trained, tmp_path):
    trained.path = tmp_path
    trained.export('m.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'m.pkl')
    assert close(applied_stats(loaded), imagenet) and close(trained_with(loaded), imagenet)
    dl = loaders(imagenet).valid
    assert 'keep them' in stats_match(dl, loaded, warn=False).findings[0].fix
    del loaded.norm_trained
    assert close(trained_with(loaded), imagenet)


def test_fix_puts_right_before_the_first_batch(capsys):
    learn = learner(imagenet, StatsMatch(fix=True))
    with warnings.catch_warnings():
        warnings.simplefilter('error', StatsMatchWarning)
        with learn.no_bar(): learn.lr_find(show_plot=False)
        assert capsys.readouterr().out.count("put 0.5/0.5 in the place of ImageNet's constants") == 1
        with learn.no_bar(): learn.fit(2)
    assert 'StatsMatch' not in capsys.readouterr().out
    assert close(applied_stats(learn), half) and learn.stats_match().ok

def test_fix_adds_what_is_missing(capsys):
    learn = learner(None, StatsMatch(fix=True))
    with learn.no_bar(): learn.fit(1)
    assert 'in the place of pixels in [0,1]' in capsys.readouterr().out
    assert close(applied_stats(learn), half)

def test_fix_leaves_a_trained_learner_alone(trained, capsys):
    trained.stats_match_cb.puts_right = True
    with trained.no_bar(): trained.fit(1)
    assert 'changes nothing: this learner has trained with ImageNet' in capsys.readouterr().out
    assert close(applied_stats(trained), imagenet)

def test_fix_touches_no_code_that_it_cannot_read(capsys):
    from fasttransform import Transform
    def mine(x:TensorImage): return x
    learn = learner(imagenet, StatsMatch(fix=True))
    for dl in learn.dls.loaders: dl.after_batch.add(Transform(mine))
    with pytest.warns(StatsMatchWarning): 
        with learn.no_bar(): learn.fit(1)
    assert ' put ' not in capsys.readouterr().out and close(applied_stats(loaders(imagenet)), imagenet)
    assert any(close(expected_stats(t), imagenet) for t in learn.dls.train.after_batch.fs if isinstance(t, Normalize))

def test_fix_of_what_is_right_says_nothing(capsys):
    learn = learner(half, StatsMatch(fix=True))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert capsys.readouterr().out == ''

def test_fix_of_random_weights_says_why(capsys):
    learn = learner(imagenet, StatsMatch(fix=True))
    learn.pretrained = False
    with learn.no_bar(): learn.fit(1)
    assert 'nothing to compare' in capsys.readouterr().out and close(applied_stats(learn), imagenet)


def test_copies_watch_and_exports_do_not(trained, tmp_path):
    twin = copy.deepcopy(trained)
    assert isinstance(twin.stats_match_cb, StatsMatch) and twin.stats_match_cb.learn is twin
    trained.path = tmp_path
    trained.export('m.pkl')
    assert isinstance(trained.stats_match_cb, StatsMatch)
    code = '''
import sys, warnings
warnings.simplefilter('ignore')
class Missing:
    def find_spec(self, name, *args):
        if name.partition('.')[0] == 'fastai_normx': raise ImportError(name)
sys.meta_path.insert(0, Missing())
from fastai.vision.all import *
learn = load_learner(sys.argv[1])
x = TensorImage(torch.full((3,32,32), 7, dtype=torch.uint8))
from pathlib import Path
with learn.no_bar(): learn.model(torch.rand(2,3,32,32))
print([type(o).__name__ for o in learn.cbs if type(o) is Callback], learn.norm_trained['stats']['mean'])
'''
    # the pickled learner names functions of this module, so it goes along
    env = dict(PYTHONPATH=str(Path(__file__).parent), PATH='', HOME=str(tmp_path))
    script = tmp_path/'load.py'
    script.write_text('def image(i): ...\ndef label(i): ...\n' + code)
    (tmp_path/'test_trained.py').write_text('def image(i): ...\ndef label(i): ...\n')
    env['PYTHONPATH'] = str(tmp_path)
    r = subprocess.run([sys.executable, script, tmp_path/'m.pkl'], capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr
    assert "['Callback'] [0.485, 0.456, 0.406]" in r.stdout
