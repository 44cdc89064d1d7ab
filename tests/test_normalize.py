"`Normalize.from_pretrained` and friends on real loaders and learners; fastai's own behaviour and float64 numpy are the judges."
import pickle, subprocess, sys, textwrap, warnings

import numpy as np
import pytest
import timm
import torch
from fastai.vision.all import (CategoryBlock, DataBlock, DataLoaders, ImageBlock, IntToFloatTensor, Learner, Normalize, PILImage, PILImageBW, RandomSplitter, RegexLabeller,
    TensorImage, TensorMask, Transform, aug_transforms, get_image_files, imagenet_stats, model_meta, noop, unet_learner, vision_learner)
from PIL import Image
from torch.utils.data import DataLoader as TorchLoader
from torchvision import models as M

from fastai_normx.all import DataStatsWarning, ExpectedStatsWarning, expected_stats

imagenet = tuple(map(tuple, imagenet_stats))
fastai_leaves_out = [n for n in M.list_models(module=M) if getattr(M, n) not in model_meta]
normalizes = lambda dl: [t for t in dl.after_batch.fs if isinstance(t, Normalize)]


def test_plain_class_and_same_arithmetic_as_fastai():
    ours, theirs = Normalize.from_pretrained('resnet50', cuda=False), Normalize.from_stats(*imagenet_stats, cuda=False)
    assert type(ours) is Normalize
    x = TensorImage(torch.rand(2, 3, 8, 8))
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.decode(ours(x)), theirs.decode(theirs(x)))
    assert isinstance(ours(x), TensorImage)
    for dt in (torch.float16, torch.bfloat16, torch.float64): assert torch.equal(ours(x.to(dt)), theirs(x.to(dt)))


def test_against_float64_numpy():
    x = np.random.default_rng(0).random((4, 3, 16, 16))
    for name in ('tf_efficientnet_lite0', 'resnet50_clip.openai', 'resnet50'):
        m, s = (np.array(o).reshape(1, 3, 1, 1) for o in expected_stats(name))
        assert np.allclose(Normalize.from_pretrained(name, cuda=False)(TensorImage(x).float()).numpy(), (x-m)/s, atol=1e-6)


def test_provenance_is_plain_data():
    n = Normalize.from_pretrained('resnet50')
    assert n.norm_stats == expected_stats('resnet50').to_dict()
    assert b'fastai_normx' not in pickle.dumps(n)


@pytest.mark.parametrize('kw,shape', [({}, (1, 3, 1, 1)), (dict(ndim=5), (1, 3, 1, 1, 1)), (dict(dim=2, ndim=5), (1, 1, 3, 1, 1)), (dict(dim=0, ndim=3), (3, 1, 1)), (dict(n_in=1), (1, 1, 1, 1))])
def test_layouts(kw, shape): assert Normalize.from_pretrained('resnet50', **kw).mean.shape == shape


def test_layouts_that_do_not_exist():
    with pytest.raises(ValueError, match='received dim=5, ndim=4'): Normalize.from_pretrained('resnet50', dim=5)


def test_errors_reach_the_caller():
    with pytest.raises(ValueError, match='Closest names'): Normalize.from_pretrained('resnet5O')
    with pytest.raises(ValueError, match='must come from you'): Normalize.from_pretrained('resnet50', n_in=4)
    with pytest.raises(ValueError, match=r'`imagenet_stats`, not `\*imagenet_stats`'): Normalize.from_pretrained(*imagenet_stats)


# Batches

@pytest.mark.parametrize('shape,msg', [((2, 1, 8, 8), 'pass `n_in=1`'), ((2, 4, 8, 8), 'Pass `n_in='), ((3, 8, 8), 'on axis 1 of 4'), ((2, 3, 2, 8, 8), 'on axis 1 of 4')])
def test_shapes_that_do_not_fit(shape, msg):
    n = Normalize.from_pretrained('resnet50', cuda=False)
    for b in (TensorImage(torch.rand(shape)), (TensorImage(torch.rand(shape)), torch.tensor([1, 2]))):
        with pytest.raises(ValueError, match=msg): n(b)


def test_one_channel_on_any_axis():
    n = Normalize.from_pretrained('resnet50', dim=2, ndim=5, n_in=1, cuda=False)
    n(TensorImage(torch.rand(2, 4, 1, 8, 8)))
    with pytest.raises(ValueError, match='on axis 2 of 5'): n(TensorImage(torch.rand(2, 1, 4, 8, 8)))


def test_integers_do_not_fit():
    with pytest.raises(ValueError, match='put `IntToFloatTensor` before it'): Normalize.from_pretrained('resnet50', cuda=False)(TensorImage(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)))


def test_batches_without_an_image_are_reported_at_the_users_line():
    n, x = Normalize.from_pretrained('resnet50', cuda=False), torch.rand(2, 3, 8, 8)
    with pytest.warns(ExpectedStatsWarning, match='found no image .* received Tensor') as ws: assert n(x) is x
    assert ws[0].filename == __file__
    dl = DataLoaders.from_dsets([(x[0], 0)]*8, [(x[0], 0)]*8, bs=4, after_batch=[n], num_workers=0)
    with pytest.warns(ExpectedStatsWarning, match='found no image'): dl.one_batch()


def test_silent_when_right(photo_dls):
    with warnings.catch_warnings():
        warnings.simplefilter('error', ExpectedStatsWarning)
        dls = photo_dls(Normalize.from_pretrained('tf_efficientnet_lite0'))
        for dl in dls.loaders: assert -1 <= dl.one_batch()[0].min() < -.5
        n = Normalize.from_pretrained('resnet50', cuda=False)
        n((TensorImage(torch.rand(2, 3, 8, 8)), TensorMask(torch.zeros(2, 8, 8)), torch.rand(2, 3, 8, 8)))


def test_other_normalize_behave_as_before():
    x = torch.rand(2, 1, 8, 8)
    n = Normalize.from_stats(*imagenet_stats, cuda=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert n(x) is x and n(TensorImage(x)).shape == (2, 3, 8, 8)


# DataLoaders

def test_grey_and_colour_blocks(photo_dls):
    with pytest.raises(ValueError, match='pass `n_in=1`'): photo_dls(Normalize.from_pretrained('resnet50'), grey=True)
    dls = photo_dls(Normalize.from_pretrained('resnet50', n_in=1), grey=True)
    raw = photo_dls(grey=True).valid.one_batch()[0]
    g = lambda k: sum(w*v for w, v in zip((.299, .587, .114), imagenet_stats[k]))
    assert torch.allclose(dls.valid.one_batch()[0], (raw - g(0))/g(1), atol=1e-5)


def test_colours_shown_are_true(photo_dls):
    dls = photo_dls(Normalize.from_pretrained('resnet50_clip.openai'))
    shown, _, _ = dls.valid.show_batch(show=False)
    raw, _, _ = photo_dls().valid.show_batch(show=False)
    assert (shown.float() - raw.float()).abs().max() <= 1  # of 255: fastai's decode rounds down


@pytest.mark.parametrize('there', [[], [Normalize.from_stats([.1]*3, [.9]*3)], [Normalize.from_stats([.1]*3, [.9]*3), Normalize.from_stats(*imagenet_stats)]])
def test_normalize_for_leaves_exactly_one(photo_dls, there):
    dls = photo_dls()
    if there: dls.add_tfms(there, 'after_batch')
    assert dls.normalize_for('tf_efficientnet_lite0') is dls
    assert dls.normalize_for('tf_efficientnet_lite0') is dls
    for dl, raw in zip(dls.loaders, photo_dls().loaders):
        n, = normalizes(dl)
        assert dl.after_batch.normalize is n and dl.after_batch.fs[-1] is n
    assert torch.allclose(dls.valid.one_batch()[0], (photo_dls().valid.one_batch()[0] - .5)/.5, atol=1e-6)
    assert expected_stats(dls).source == expected_stats('tf_efficientnet_lite0').source


def test_normalize_for_changes_nothing_when_it_cannot_answer(photo_dls):
    dls = photo_dls(Normalize.from_stats(*imagenet_stats))
    with pytest.raises(ValueError): dls.normalize_for('resnet5O')
    assert len(normalizes(dls)) == 1
    other = DataLoaders(TorchLoader([(torch.rand(3, 8, 8), 0)]*4), TorchLoader([(torch.rand(3, 8, 8), 0)]*4))
    with pytest.raises(ValueError, match='needs fastai loaders .* holds DataLoader, DataLoader'): other.normalize_for('resnet50')


@pytest.mark.filterwarnings('ignore::fastai_normx.expected.ExpectedStatsWarning')
def test_builders_that_fastai_leaves_out_get_their_constants(photo_dls):
    assert len(fastai_leaves_out) == 64
    dls = photo_dls()
    for n in fastai_leaves_out:
        t = M.get_model_weights(n).DEFAULT.transforms()
        s = expected_stats(dls.normalize_for(getattr(M, n)))
        assert tuple(s) == (tuple(t.mean), tuple(t.std)), n
        assert len(normalizes(dls.train)) == len(normalizes(dls.valid)) == 1


@pytest.mark.parametrize('arch', ['mobilenet_v3_small', 'shufflenet_v2_x0_5', 'efficientnet_b0', 'regnet_x_400mf', 'convnext_tiny'])
def test_left_out_builders_train_on_normalized_data(photo_dls, offline_weights, arch):
    arch, seen = getattr(M, arch), []
    assert arch not in model_meta
    learn = vision_learner(photo_dls(), arch)
    assert not normalizes(learn.dls.train)  # fastai's silence
    learn = vision_learner(photo_dls().normalize_for(arch), arch)
    h = learn.model.register_forward_pre_hook(lambda m, x: seen.append(x[0].min().item()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    h.remove()
    assert seen and min(seen) < -1
    assert tuple(expected_stats(learn)) == imagenet


# Learners

def test_learner_sources(photo_dls, offline_weights):
    dls = photo_dls()
    with pytest.raises(ValueError, match='pretrained=False'): expected_stats(vision_learner(dls, M.resnet18, pretrained=False))
    assert tuple(expected_stats(vision_learner(dls, M.resnet18))) == imagenet
    assert tuple(expected_stats(unet_learner(dls, M.resnet18, n_out=2))) == imagenet
    assert expected_stats(vision_learner(dls, M.resnet18, n_in=1)).n_in == 1
    with pytest.raises(ValueError, match='does not record which weights'): expected_stats(Learner(dls, M.resnet18(), loss_func=noop))
    with pytest.warns(ExpectedStatsWarning, match='does not record `weights=`'): assert expected_stats(vision_learner(dls, M.vgg16, n_out=2, cut=-2)).n_in == 3
    learn = vision_learner(dls, 'test_vit.r160_in1k', pretrained_cfg_overlay=dict(state_dict=timm.create_model('test_vit').state_dict()))
    assert expected_stats(learn).mean == timm.models.get_pretrained_cfg('test_vit.r160_in1k').mean


def test_a_body_cut_from_a_model_that_converts_its_input(photo_dls, offline_weights):
    from torchvision.models import googlenet
    with pytest.warns(ExpectedStatsWarning, match='a body cut from it'): assert tuple(expected_stats(googlenet)) == imagenet
    learn = vision_learner(photo_dls(), googlenet)
    s = expected_stats(learn)
    assert tuple(s) == ((.5,)*3, (.5,)*3)
    # the judge: the whole model on ImageNet's constants, and its own body on these, see the same
    whole = googlenet(weights='DEFAULT')
    x = torch.rand(2, 3, 64, 64)
    norm = lambda st: (x - torch.tensor(st[0])[:, None, None])/torch.tensor(st[1])[:, None, None]
    assert torch.allclose(whole._transform_input(norm(imagenet)), norm(tuple(s)), atol=1e-5)


def test_learners_of_timm_models(photo_dls):
    with pytest.raises(ValueError, match='pretrained=False'): expected_stats(vision_learner(photo_dls(), timm.models.resnet18, pretrained=False))
    s = expected_stats(Learner(photo_dls(), timm.create_model('resnet18', num_classes=2), loss_func=noop))
    assert tuple(s) == imagenet and 'random weights' in s.notes[0]


def test_subclasses_with_only_expected_imported():
    code = """
        import warnings; warnings.filterwarnings('ignore')
        from fastai.vision.all import ImageDataLoaders
        from fastai_normx.expected import expected_stats
        try: expected_stats(ImageDataLoaders())
        except ValueError as e: print(e)"""
    out = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout
    assert 'holds no loader' in out
    with pytest.raises(ValueError, match='holds no loader'): DataLoaders().normalize_for('resnet50')


def test_targets_that_are_images():
    with pytest.raises(ValueError, match='targets too'): Normalize.from_pretrained('resnet50', cuda=False)((TensorImage(torch.rand(2, 3, 8, 8)), TensorImage(torch.rand(2, 1, 8, 8))))


def test_exported_learner_predicts_without_this_package(tmp_path, offline_weights):
    from sklearn.datasets import load_sample_images
    tiles = [im[i:i+64, j:j+64] for im in load_sample_images().images for i in range(0, 384, 128) for j in range(0, 576, 128)]
    for k, t in enumerate(tiles): PILImage.create(t).save(tmp_path/f'{"temple" if k < len(tiles)//2 else "flower"}_{k}.png')
    db = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=RegexLabeller(r'(\w+)_\d+.png$'), splitter=RandomSplitter(seed=0),
                   batch_tfms=Normalize.from_pretrained(M.mobilenet_v3_small))
    learn = vision_learner(db.dataloaders(tmp_path, bs=4, num_workers=0), M.mobilenet_v3_small)
    learn.export(tmp_path/'m.pkl')
    f = next(tmp_path.glob('flower*'))
    want = learn.predict(f)[2]
    code = f'''
        import sys, warnings; warnings.filterwarnings('ignore')
        class Block:
            def find_spec(self, name, *a):
                if name.partition('.')[0] == 'fastai_normx': raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Block())
        from fastai.vision.all import *
        learn = load_learner({str(tmp_path/'m.pkl')!r})
        with learn.no_bar(): p = learn.predict({str(f)!r})[2]
        assert not any(m.startswith('fastai_normx') for m in sys.modules)
        print(*p.tolist())
        print(learn.dls.after_batch.normalize.norm_stats['source'])'''
    out = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout.strip().splitlines()
    assert np.allclose([float(o) for o in out[-2].split()], want.tolist(), atol=1e-5)
    assert out[-1].endswith('MobileNet_V3_Small_Weights.IMAGENET1K_V1')


# from_data

def test_from_data_is_numpys_answer_whatever_the_pipeline_does(photo_dls):
    dls = photo_dls(*aug_transforms(), Normalize.from_stats([.1]*3, [.9]*3))
    own = np.stack([np.asarray(dls.train_ds[i][0]) for i in range(len(dls.train_ds))]).astype(float)/255
    n = Normalize.from_data(dls)
    assert np.allclose(n.norm_stats['mean'], own.mean((0, 1, 2)), atol=1e-6) and np.allclose(n.norm_stats['std'], own.std((0, 1, 2)), atol=1e-6)
    assert n.norm_stats['source'] == f'the data, {len(own)} images'
    assert len(normalizes(dls.train)) == 1  # the data themselves are left alone


@pytest.mark.parametrize('c', [1, 3, 5])
def test_from_data_sources(c):
    xs = [torch.randint(0, 256, (n, c, 8, 8), dtype=torch.uint8) for n in (4, 4, 2)]
    own = torch.cat(xs).numpy().astype(float)/255
    for data in (xs, [x/255 for x in xs], [(x, 0) for x in xs], TorchLoader(torch.cat(xs), batch_size=3), iter(xs)):
        n = Normalize.from_data(data, cuda=False)
        assert np.allclose(n.norm_stats['mean'], own.mean((0, 2, 3)), atol=1e-6) and np.allclose(n.norm_stats['std'], own.std((0, 2, 3)), atol=1e-6)
    v = torch.rand(2, 4, c, 8, 8)
    assert np.allclose(Normalize.from_data([v], dim=2, ndim=5).norm_stats['mean'], v.double().mean((0, 1, 3, 4)), atol=1e-6)


def test_from_data_bad_input(tmp_path):
    with pytest.raises(ValueError, match='data are empty'): Normalize.from_data([])
    with pytest.raises(ValueError, match='could read none of the 1 image files'): Normalize.from_data([tmp_path/'a.png'])
    with pytest.raises(ValueError, match='finite'): Normalize.from_data([torch.full((2, 3, 4, 4), float('nan'))])
    with pytest.raises(ValueError, match='greater than 0'): Normalize.from_data([torch.zeros(2, 3, 8, 8)])
    with pytest.warns(ExpectedStatsWarning, match='normalized already'): Normalize.from_data([torch.randn(2, 3, 8, 8)])
    x = torch.rand(2, 3, 8, 8)
    x[0, 0, 0, 0] = float('inf')
    with pytest.warns(ExpectedStatsWarning, match='1 pixels that are NaN or infinite'): Normalize.from_data([x])


def test_from_data_of_a_learner_files_and_part(photo_dls, tmp_path):
    dls = photo_dls(Normalize.from_stats([.1]*3, [.9]*3))
    whole = Normalize.from_data(dls).norm_stats
    assert Normalize.from_data(Learner(dls, M.resnet18(), loss_func=noop)).norm_stats == whole
    assert '9 images' in Normalize.from_data(dls, n_items=9).norm_stats['source']
    for i in range(len(dls.train_ds)): dls.train_ds[i][0].save(tmp_path/f'{i}.png')
    assert np.allclose(Normalize.from_data(tmp_path).norm_stats['mean'], whole['mean'], atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(photo_dls):
    dls = photo_dls(Normalize.from_pretrained('resnet50'))
    x = dls.one_batch()[0]
    assert x.is_cuda and x.min() < -1
    assert dls.normalize_for('tf_efficientnet_lite0').one_batch()[0].is_cuda


# The scale of the pixels

def at_model(dls): return [dl.new(shuffle=False, drop_last=False).one_batch()[0].double().cpu().numpy() for dl in dls.loaders]


def want(dls, mean, std, div=255.):
    res = []
    for dl in dls.loaders:
        x = np.stack([np.asarray(dl.dataset[i][0]) for i in range(min(dl.bs, len(dl.dataset)))]).astype(np.float64)
        x = (x if x.ndim == 4 else x[..., None]).transpose(0, 3, 1, 2)/div
        res.append((x-np.reshape(mean, (1, -1, 1, 1)))/np.reshape(std, (1, -1, 1, 1)))
    return res


def check_at_model(dls, mean, std, div=255.):
    for got, right in zip(at_model(dls), want(dls, mean, std, div)): np.testing.assert_allclose(got, right, atol=2e-5, rtol=1e-5)


def divs(dl): return [t.div for e in ('after_item', 'before_batch', 'after_batch') for t in getattr(dl, e).fs if isinstance(t, IntToFloatTensor)]


class Half(Transform):
    order = 12
    def encodes(self, x: TensorImage): return x/2


def division(div, order):
    t = IntToFloatTensor(div=div)
    t.order = order
    return t


pipelines = {'1': [IntToFloatTensor(div=1)], '65535': [IntToFloatTensor(div=65535)], '255': [], 'normalized': [IntToFloatTensor(div=1), Normalize.from_stats([.1], [.9], cuda=False)],
    'order': [division(1, 20)], '255*255': [IntToFloatTensor(div=255*255)]}


@pytest.mark.parametrize('tfms', pipelines.values(), ids=pipelines)
def test_div_puts_pixels_in_0_1(photo_dls, tfms):
    dls = photo_dls(*tfms)
    with warnings.catch_warnings():
        warnings.simplefilter('error', ExpectedStatsWarning)
        assert dls.normalize_for('resnet50', div=255) is dls
    check_at_model(dls, *imagenet)
    for dl in dls.loaders:
        assert divs(dl) == [255] and len(normalizes(dl)) == 1 and dl.after_batch.int_to_float_tensor.div == 255
        assert [type(t) for t in dl.after_batch.fs if isinstance(t, (IntToFloatTensor, Normalize))] == [IntToFloatTensor, Normalize]
    dls.normalize_for('tf_efficientnet_lite0', div=51)
    check_at_model(dls, [.5]*3, [.5]*3, 51)


def test_div_adds_a_division_where_there_is_none(photo_dls):
    dls = photo_dls()
    for dl in dls.loaders:
        dl.after_batch.fs = dl.after_batch.fs.filter(lambda t: not isinstance(t, IntToFloatTensor))
        dl.after_batch.__dict__.pop('int_to_float_tensor', None)
    check_at_model(dls.normalize_for('resnet50', div=255), *imagenet)
    assert all(divs(dl) == [255] for dl in dls.loaders)


def test_div_mends_a_division_among_the_item_transforms(photo_dls):
    dls = photo_dls(item_tfms=[division(1, 30), ])
    assert [len(divs(dl)) for dl in dls.loaders] == [2, 2]
    check_at_model(dls.normalize_for('resnet50', div=255), *imagenet)


def test_div_for_grey_images_and_one_constant(photo_dls):
    dls = photo_dls(IntToFloatTensor(div=1), grey=True)
    check_at_model(dls.normalize_for(((.5,), (.25,)), div=255), [.5], [.25])
    dls = photo_dls(IntToFloatTensor(div=1), grey=True)
    dls.normalize_for('resnet50', n_in=1, div=255)
    check_at_model(dls, *(sum(w*v for w, v in zip((.299, .587, .114), o)) for o in imagenet))


def test_div_leaves_the_callers_own_transforms_and_augmentation_alone(photo_dls):
    own, aug = IntToFloatTensor(div=1), aug_transforms()
    dls = photo_dls(own, *aug)
    was = [type(t) for t in dls.train.after_batch.fs]
    dls.normalize_for('resnet50', div=255)
    assert own.div == 1 and [type(t) for t in dls.train.after_batch.fs] == [*was, Normalize]
    again = photo_dls(own)
    assert divs(again.train) == [1]
    shown = dls.valid.show_batch(show=False)[0]
    assert (shown.float()-photo_dls().valid.show_batch(show=False)[0].float()).abs().max() <= 1


@pytest.mark.parametrize('div', [1, 65535, 255*255, 2**16, 127.5, 250])
def test_another_divisor_is_said_with_what_mends_it(photo_dls, div):
    dls, state = photo_dls(IntToFloatTensor(div=div)), torch.get_rng_state()
    with pytest.warns(ExpectedStatsWarning, match=f'divides 8-bit pixels by {div:g}. Pass `div=255`') as ws: dls.normalize_for('resnet50')
    assert len([w for w in ws if w.category is ExpectedStatsWarning]) == 1 and ws[-1].filename == __file__ and len(str(ws[-1].message).split()) <= 40
    assert divs(dls.train) == [div] and torch.equal(state, torch.get_rng_state())
    check_at_model(dls, *imagenet, div)  # as asked for


def test_two_divisions_in_a_row_are_said_and_become_one(photo_dls):
    dls = photo_dls()
    dls.add_tfms([division(255, 11)], 'after_batch')  # a DataBlock keeps one of each class
    with pytest.warns(ExpectedStatsWarning, match='divides 8-bit pixels by 65025'): dls.normalize_for('resnet50')
    check_at_model(dls, *imagenet, 65025)
    check_at_model(dls.normalize_for('resnet50', div=255), *imagenet)
    assert [divs(dl) for dl in dls.loaders] == [[255]]*2


def tensor_dls(x, *tfms):
    items = [(TensorImage(o), 0) for o in x]
    return DataLoaders.from_dsets(items, items, bs=4, num_workers=0, after_batch=list(tfms), device='cpu', shuffle=False)


@pytest.mark.parametrize('make', [lambda f: f(), lambda f: f(IntToFloatTensor(div=256)), lambda f: f(IntToFloatTensor(div=1), Half()),
    lambda f: tensor_dls(torch.rand(8, 3, 8, 8), IntToFloatTensor(div=1)), lambda f: tensor_dls((torch.rand(8, 3, 8, 8)*65535).int(), IntToFloatTensor(div=65535)),
    lambda f: tensor_dls(torch.randint(0, 2, (8, 3, 8, 8), dtype=torch.uint8), IntToFloatTensor(div=1)), lambda f: tensor_dls(torch.rand(8, 3, 8, 8))])
def test_right_or_unknown_divisions_are_no_concern(photo_dls, make):
    dls = make(photo_dls)
    with warnings.catch_warnings():
        warnings.simplefilter('error', ExpectedStatsWarning)
        dls.normalize_for('resnet50')


def test_constants_for_0_255_want_no_division(photo_dls):
    dls = photo_dls(IntToFloatTensor(div=1))
    s = [255*o for o in imagenet_stats[0]], [255*o for o in imagenet_stats[1]]
    with pytest.warns(ExpectedStatsWarning) as ws: dls.normalize_for(s)
    assert not any('divides' in str(w.message) for w in ws)
    check_at_model(dls, *imagenet)


def test_a_div_that_is_no_number_changes_nothing(photo_dls):
    dls = photo_dls(Normalize.from_stats([.1]*3, [.9]*3))
    for bad in (0, -255, True, '255', float('nan'), float('inf'), [255]):
        with pytest.raises(ValueError, match='`div` is the value of white'): dls.normalize_for('resnet50', div=bad)
    assert normalizes(dls.train)[0].mean.flatten()[0].item() == pytest.approx(.1) and divs(dls.train) == [255]


def test_normalize_among_item_transforms_goes_and_augmentation_stays(photo_dls):
    class Early(Transform):
        def encodes(self, x: PILImage): return x
    dls = photo_dls(*aug_transforms(), item_tfms=[Early()])
    for dl in dls.loaders:
        dl.after_item.add(Normalize.from_stats([.1]*3, [.9]*3, ndim=3, cuda=False))
        dl.before_batch.add(Normalize.from_stats([.2]*3, [.8]*3, ndim=3, cuda=False))
    augs = [type(t) for t in dls.train.after_batch.fs]
    dls.normalize_for('resnet50')
    for dl in dls.loaders:
        assert not [t for p in (dl.after_item, dl.before_batch) for t in p.fs if isinstance(t, Normalize)] and any(isinstance(t, Early) for t in dl.after_item.fs)
    assert [type(t) for t in dls.train.after_batch.fs] == [*augs, Normalize]


def test_from_data_says_when_files_hold_more_than_8_bits(tmp_path):
    for i in range(6): Image.fromarray((np.arange(4096).reshape(64, 64)//(1+i % 3)).astype(np.uint16)).save(tmp_path/f'{i % 2}_{i}.png')
    def make(**kw): return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda f: f.name[0], splitter=RandomSplitter(.3, seed=0), **kw).dataloaders(tmp_path, bs=2, num_workers=0)
    for data in (tmp_path, make()):
        with pytest.warns(DataStatsWarning, match='so 12 bits. Pillow clips them') as ws: n = Normalize.from_data(data, cuda=False)
        assert len(ws) == 1 and n.norm_stats['mean'][0] > .9
    scope = {}
    exec(str(ws[0].message).partition('\n')[2], scope)
    dls = make(get_x=scope['open_deep'])
    with warnings.catch_warnings():
        warnings.simplefilter('error', DataStatsWarning)
        n = Normalize.from_data(dls, cuda=False)
    own = np.stack([np.asarray(Image.open(f)).astype(np.float64)/4095 for f in dls.train.items])
    assert np.allclose(n.norm_stats['mean'], own.mean(), atol=1e-3) and np.allclose(n.norm_stats['std'], own.std(), atol=1e-3)


def test_looking_at_an_item_draws_no_random_number(photo_dls):
    import random
    from fastai.vision.all import RandomResizedCrop
    dls = photo_dls(IntToFloatTensor(div=1), item_tfms=RandomResizedCrop(32))
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.warns(ExpectedStatsWarning, match='divides 8-bit pixels by 1'): dls.normalize_for('resnet50')
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2] and torch.equal(torch.get_rng_state(), state[2])
