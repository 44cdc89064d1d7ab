"Each library's own transform, run on black and white, is the judge of what we say about it."
import os
import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torchvision import models as M, transforms as T, tv_tensors
from torchvision.transforms import v2

os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'
A = pytest.importorskip('albumentations')
kornia = pytest.importorskip('kornia')
K = kornia.augmentation

from fastai_normx.constants import Affine
from fastai_normx.expected import ExpectedStatsWarning, NormStats, expected_stats
from fastai_normx.transforms import chain_map, is_transform, know, known, read_chain

imagenet = (.485, .456, .406), (.229, .224, .225)
half = (.5,)*3, (.5,)*3
deep = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
quiet = pytest.mark.filterwarnings('ignore::fastai_normx.expected.ExpectedStatsWarning')


def apply(t, x):
    "What transform `t` makes of the 8-bit image `x` [H,W,3], as float64 [3,...]"
    if type(t).__module__.startswith('albumentations'): y = t(image=x)['image']
    elif isinstance(t, (list, tuple)):
        y = x
        for o in t: y = o(image=y)['image'] if type(o).__module__.startswith('albumentations') else o(y)
    else: y = t(x)
    y = np.asarray(y, dtype=float)
    y = y.reshape(y.shape[-3:])
    return y if y.shape[0] == 3 else y.transpose(2, 0, 1)


def told(t, x, prepare=lambda x: x):
    "mean and std that map pixels scaled to [0,1] as `t` does, from black and white"
    black, white = (apply(t, prepare(np.full_like(x, v))).reshape(3, -1)[:, 0] for v in (0, 255 if x.dtype == np.uint8 else 65535))
    return -black/(white-black), 1/(white-black)


def same(s, want, tol=1e-4):
    s = s.spread(3) if isinstance(s, NormStats) else s
    mean, std = (np.array(o) for o in s)
    return np.allclose(mean, want[0], rtol=tol, atol=tol*want[1].max()) and np.allclose(std, want[1], rtol=tol)


x = np.zeros((8, 8, 3), np.uint8)
to_pil = lambda x: Image.fromarray(x)
to_chw = lambda x: torch.from_numpy(x).permute(2, 0, 1)
to_batch = lambda x: torch.from_numpy(x).permute(2, 0, 1)[None].float()/255


# albumentations

albumentations = {
    'plain': A.Normalize(*imagenet),
    'composed': A.Compose([A.Resize(8, 8), A.HorizontalFlip(p=.5), A.Normalize(*half), A.pytorch.ToTensorV2()]),
    '0-255 constants': A.Compose([A.Normalize(*deep, max_pixel_value=1.)]),
    'no division': A.Normalize(*imagenet, max_pixel_value=1.),
    'twice': A.Compose([A.Normalize(*imagenet), A.Normalize(*half, max_pixel_value=1.)]),
    'float first': A.Compose([A.ToFloat(), A.Normalize(*imagenet, max_pixel_value=1.)]),
    'float first, divided again': A.Compose([A.ToFloat(), A.Normalize(*imagenet)]),
    '16 bits, float': A.Compose([A.ToFloat(max_value=65535), A.Normalize(*imagenet, max_pixel_value=1.)]),
    '16 bits': A.Normalize(*imagenet, max_pixel_value=65535),
    'to float and back': A.Compose([A.ToFloat(), A.FromFloat(), A.Normalize(*imagenet)]),
    'nested': A.Compose([A.Sequential([A.CenterCrop(8, 8), A.Normalize(*imagenet)], p=1)]),
    'one number': A.Normalize(.5, .25),
    'colour before': A.Compose([A.ColorJitter(p=.0001), A.GaussNoise(p=.0001), A.Normalize(*imagenet)]),
    'dropout after': A.Compose([A.Normalize(*imagenet), A.CoarseDropout(p=.0001)]),
    'choice of flips': A.Compose([A.OneOf([A.HorizontalFlip(), A.VerticalFlip()]), A.Normalize(*imagenet)]),
    'choice of colours': A.Compose([A.SomeOf([A.CLAHE(p=.0001), A.ToGray(p=.0001)], n=1, p=.0001), A.Normalize(*imagenet)]),
}

@quiet
@pytest.mark.parametrize('name', albumentations)
def test_albumentations_acts_as_stated(name):
    t = albumentations[name]
    want = told(t, x.astype(np.uint16) if '16 bits' in name else x)
    assert same(expected_stats(t), want) and same(Affine(*chain_map(t)) if chain_map(t).n_in == 3 else expected_stats(t), want)
    assert expected_stats(t).source.startswith('albumentations')


@pytest.mark.parametrize('t,msg', [
    *[(A.Compose([A.Normalize(normalization=n)]), f"normalization='{n}' uses the statistics of each image") for n in ('image', 'image_per_channel', 'min_max', 'min_max_per_channel')],
    (A.Normalize(p=.5), 'at random'), (A.Compose([A.Normalize(*imagenet)], p=.5), 'Compose normalizes at random'),
    (A.Compose([A.Sequential([A.Normalize()])]), 'Sequential normalizes at random'),  # albumentations' Sequential has p=.5
    (A.OneOf([A.Normalize(*imagenet), A.Normalize(*half)]), 'OneOf normalizes at random'), (A.Compose([A.SomeOf([A.Normalize(), A.Blur()], n=1)]), 'at random'),
    (A.Compose([A.RandomOrder([A.Normalize(), A.Blur()])]), 'at random'), (A.Compose([A.ToFloat(p=.5), A.Normalize()]), 'ToFloat .*at random'),
    (A.Compose([A.Normalize(), A.ColorJitter()]), 'ColorJitter comes after a Normalize and clips'), (A.Compose([A.Normalize(), A.GaussianBlur()]), 'GaussianBlur comes after'),
    (A.Compose([A.Normalize(), A.Posterize()]), 'Posterize comes after'), (A.Compose([A.Normalize(), A.ToGray()]), 'ToGray comes after a Normalize and mixes'),
    (A.Compose([A.InvertImg(p=1), A.Normalize()]), 'InvertImg inverts every image'), (A.Compose([A.Lambda(image=lambda x, **kw: x/2), A.Normalize()]), 'Lambda .*not known from here'),
    (A.Compose([A.FromFloat(dtype='uint16'), A.Normalize()]), 'makes uint16'), (A.Compose([A.HorizontalFlip()]), 'no Normalize'),
])
def test_albumentations_that_no_constants_describe(t, msg):
    with pytest.raises(ValueError, match=msg) as e: expected_stats(t)
    assert type(t).__name__ in str(e.value)  # the caller's own input


# kornia

@quiet
@pytest.mark.parametrize('t', [
    K.Normalize(torch.tensor(imagenet[0]), torch.tensor(imagenet[1])), K.Normalize(.5, .25), K.Normalize(torch.tensor([imagenet[0]]), torch.tensor([imagenet[1]])),
    kornia.enhance.Normalize(*imagenet), kornia.enhance.Normalize(torch.tensor(imagenet[0]), torch.tensor(imagenet[1])), kornia.enhance.Normalize(0., 255.),
    kornia.enhance.Denormalize(*map(list, imagenet)), K.Denormalize(*map(list, imagenet)),
    K.AugmentationSequential(K.RandomHorizontalFlip(), K.Normalize(*map(list, half)), data_keys=['input']),
    K.ImageSequential(K.ColorJitter(.1, .1, .1, .1, p=.0001), K.Normalize(*map(list, half)), K.RandomErasing(p=.0001)),
    nn.Sequential(K.Resize(8), K.Normalize(*map(list, imagenet)), K.RandomGaussianBlur((3, 3), (1., 1.))),
    K.ImageSequential(K.Normalize(*map(list, imagenet)), K.Denormalize(*map(list, imagenet))),
    nn.Sequential(K.Normalize(*map(list, imagenet)), kornia.enhance.Normalize(*half)),
])
def test_kornia_acts_as_stated(t):
    assert same(expected_stats(t), told(t, x, to_batch))


@quiet
@pytest.mark.parametrize('t,prepare', [
    ([T.ToTensor(), K.Normalize(*map(list, imagenet))], to_pil), ([A.Resize(8, 8), T.ToTensor(), K.Normalize(*map(list, imagenet)), K.Denormalize(*map(list, half))], lambda x: x),
    (T.Compose([v2.PILToTensor(), kornia.enhance.Rescale(1/255), v2.Normalize(*imagenet)]), to_pil),
    (nn.Sequential(kornia.enhance.Rescale(1/255), kornia.enhance.Normalize(*imagenet)), lambda x: to_batch(x)*255),
    ([A.Normalize(*imagenet), A.pytorch.ToTensorV2(), T.Normalize(*half)], lambda x: x), ([A.ToFloat(), A.pytorch.ToTensorV2(), v2.Normalize(*imagenet)], lambda x: x),
    ([A.pytorch.ToTensorV2(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*imagenet)], lambda x: x),
    ([A.pytorch.ToTensorV2(), v2.ToDtype(torch.float32), v2.Normalize(*deep)], lambda x: x),
    ([T.ToTensor(), kornia.color.RgbToRgb255(), v2.Normalize(*deep)], to_pil),
])
def test_libraries_mix_step_by_step(t, prepare):
    assert same(expected_stats(t), told(t, x, prepare))


@pytest.mark.parametrize('t,msg', [
    (K.Normalize([.5]*3, [.5]*3, p=.3), 'at random'), (K.ImageSequential(K.Normalize([.5]*3, [.5]*3), K.Resize(8), random_apply=1), 'ImageSequential normalizes at random'),
    (K.Normalize(torch.zeros(2, 3), torch.ones(2, 3)), 'one number per channel'), (nn.Sequential(K.Normalize([.5]*3, [.5]*3), K.RandomPosterize()), 'RandomPosterize comes after'),
    (nn.Sequential(kornia.enhance.AdjustGamma(2.), kornia.enhance.Normalize(*half)), 'AdjustGamma does to pixels is not known'),
    (nn.Sequential(kornia.enhance.Rescale(255.), kornia.enhance.Normalize(*half)), 'nothing before it says'),
    ([T.PILToTensor(), T.Normalize(*half)], 'takes floats, and receives 8-bit'), (K.PatchSequential(K.Normalize([.5]*3, [.5]*3), patchwise_apply=False), 'at random'),
])
def test_kornia_and_mixtures_that_no_constants_describe(t, msg):
    with pytest.raises(ValueError, match=msg): expected_stats(t)


def test_bgr_from_kornia():
    t = nn.Sequential(kornia.color.RgbToBgr(), kornia.enhance.Normalize((.1, .2, .3), (.5, .25, .125)))
    with pytest.warns(ExpectedStatsWarning, match='turns RGB into BGR'): s = expected_stats(t)
    img = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    ours = (img.transpose(2, 0, 1)[::-1]/255 - np.array(s.mean)[:, None, None])/np.array(s.std)[:, None, None]  # as the note says: reverse before
    assert np.allclose(ours, apply(t, to_batch(img)), atol=1e-5) and 'before Normalize' in s.notes[-1]


# torchvision, timm and what stands between

class OwnNormalize(T.Normalize):
    def __init__(self): super().__init__(*imagenet)

class OwnScaling(T.Normalize):
    def forward(self, x): return super().forward(x/2)

class OwnCompose:
    def __init__(self, *ts): self.transforms = ts
    def __call__(self, x): return x

def halve(x): return x/2

@pytest.mark.parametrize('steps,name', [
    ([T.ToTensor(), T.Lambda(lambda x: x*255), T.Normalize(*deep)], 'Lambda'), ([T.ToTensor(), halve, T.Normalize(*imagenet)], 'halve'),
    ([T.ToTensor(), T.Normalize(*imagenet), T.Lambda(halve)], 'Lambda'), ([T.ToTensor(), v2.Lambda(halve), v2.Normalize(*imagenet)], 'Lambda'),
    ([T.ToTensor(), OwnScaling(*imagenet)], 'OwnScaling'), ([T.ToTensor(), nn.Softmax(0), T.Normalize(*imagenet)], 'Softmax'),
    ([T.ToTensor(), T.LinearTransformation(torch.eye(3), torch.zeros(3))], 'LinearTransformation'), ([OwnCompose(T.Normalize(*imagenet))], 'OwnCompose'),
    ([T.ToTensor(), torch.sqrt, T.Normalize(*imagenet)], 'sqrt|builtin'), ([T.ToTensor(), None, T.Normalize(*imagenet)], 'NoneType'),
])
def test_a_step_that_is_not_known_is_named(steps, name):
    for t in (T.Compose(steps), steps):
        with pytest.raises(ValueError, match=f'(?s)({name}).*not known from here.*part of'): expected_stats(t)


def test_holders_from_elsewhere():
    with pytest.raises(ValueError, match='OwnCompose does to pixels is not known'): expected_stats(OwnCompose(T.Normalize(*imagenet)))
    with pytest.raises(ValueError, match='Tanh does to pixels is not known'): expected_stats(nn.Sequential(nn.Tanh(), T.Normalize(*imagenet)))
    with pytest.raises(ValueError, match='nested too deeply'):
        loop = []
        loop += [T.ToTensor(), loop]
        expected_stats(loop)
    assert expected_stats(T.Compose([T.ToTensor(), OwnNormalize()])).mean == imagenet[0]  # changes nothing but the arguments


colour = [T.ColorJitter(.2), T.AutoAugment(), T.RandAugment(), T.TrivialAugmentWide(), T.AugMix(), T.RandomPosterize(3), T.RandomEqualize(), T.RandomAdjustSharpness(2), T.RandomGrayscale(),
          v2.RandomPhotometricDistort(), timm.data.auto_augment.rand_augment_transform('rand-m9', {}), v2.RandomChannelPermutation(), T.RandomSolarize(.5), T.RandomInvert()]
harmless = [T.Resize(8), T.CenterCrop(8), T.RandomHorizontalFlip(), T.RandomResizedCrop(8), T.Pad(1), T.RandomRotation(9), T.RandomAffine(9), T.GaussianBlur(3), nn.Identity(), v2.Identity(),
            v2.RandomZoomOut(), v2.ScaleJitter((8, 8)), T.ElasticTransform(), v2.ToPureTensor(), v2.RandomShortestSize(8), timm.data.transforms.ResizeKeepRatio(8)]
erase = [T.RandomErasing(), v2.RandomErasing(), timm.data.random_erasing.RandomErasing(), v2.MixUp(num_classes=2), A.CoarseDropout(), K.RandomErasing(), K.RandomChannelDropout()]

@pytest.mark.parametrize('t', colour, ids=lambda t: type(t).__name__)
def test_colour_goes_before(t):
    assert tuple(expected_stats(T.Compose([t, T.ToTensor(), T.Normalize(*imagenet)]))) == imagenet
    assert tuple(expected_stats(T.Compose([T.ToTensor(), T.RandomApply([t]), T.Normalize(*imagenet)]))) == imagenet
    for after in (t, T.RandomApply([t]), T.RandomChoice([t, T.Resize(8)]), T.RandomOrder([T.Pad(1), t])):
        with pytest.raises(ValueError, match='comes after a Normalize and (clips|mixes)'): expected_stats(T.Compose([T.ToTensor(), T.Normalize(*imagenet), after]))


@pytest.mark.parametrize('t', harmless+erase, ids=lambda t: type(t).__name__)
def test_geometry_and_dropout_go_anywhere(t):
    for steps in ([t, T.ToTensor(), T.Normalize(*imagenet)], [T.ToTensor(), t, T.Normalize(*imagenet)], [T.ToTensor(), T.Normalize(*imagenet), T.RandomApply([t], .3)]):
        assert tuple(expected_stats(T.Compose(steps))) == imagenet


floats = np.random.default_rng(0).random((64, 64, 3)).astype(np.float32)

def _made(cls):
    size = dict(Resize=8, CenterCrop=8, RandomCrop=8, RandomResizedCrop=8, Pad=2, RandomAffine=9, RandomRotation=9, GaussianBlur=3, RandomPosterize=3, RandomSolarize=.5,
                RandomAdjustSharpness=2)
    return cls(*[size[cls.__name__]] if cls.__name__ in size else [])

@pytest.mark.parametrize('lib', ['albumentations', 'kornia', 'torchvision'])
def test_whatever_clips_floats_is_not_called_harmless(lib):
    "Every transform that can be made without arguments, on values in [-2,2]: what clips them must be refused after a Normalize"
    mod, batch = dict(albumentations=(A, None), kornia=(K, True), torchvision=(v2, False))[lib]
    values = (floats-.5)*4
    tried = 0
    for n in sorted(dir(mod)):
        cls = getattr(mod, n)
        if not isinstance(cls, type) or n.startswith('To') or n in ('Normalize', 'FromFloat', 'Lambda', 'JPEG'): continue
        try:
            t = cls(p=1.) if lib != 'torchvision' else _made(cls)
            random.seed(0)
            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                y = t(image=values)['image'] if lib == 'albumentations' else t(torch.from_numpy(values).permute(2, 0, 1)[None] if batch else torch.from_numpy(values).permute(2, 0, 1))
            y = np.asarray(y, dtype=float)
        except Exception: continue  # needs arguments, or other inputs
        clipped = y.min() >= -1e-6 and y.max() <= 1+1e-6
        tried += 1
        try: chain_map([T.ToTensor(), T.Normalize(*half), t])
        except ValueError: continue
        assert not clipped, n
    assert tried > 20


def test_timm_transforms():
    for kw in (dict(is_training=True, auto_augment='rand-m9-mstd0.5', re_prob=.2), dict(is_training=True, color_jitter=.4), {}, dict(crop_mode='border')):
        t = timm.data.create_transform(224, mean=(.1, .2, .3), std=(.4, .3, .2), **kw)
        assert np.allclose(tuple(expected_stats(t)), ((.1, .2, .3), (.4, .3, .2)), atol=1e-7)
    with pytest.warns(ExpectedStatsWarning, match='hardly shifts pixels in 0-255'): s = expected_stats(T.Compose([timm.data.transforms.ToTensor(), T.Normalize(*imagenet)]))
    assert same(s, told(T.Compose([timm.data.transforms.ToTensor(), T.Normalize(*imagenet)]), x, to_pil))


def test_open_clip_transforms():
    open_clip = pytest.importorskip('open_clip')
    for kw in (dict(is_train=False), dict(is_train=True), dict(is_train=True, aug_cfg=dict(color_jitter=(.3, .3, .3, .1), color_jitter_prob=.8, gray_scale_prob=.2))):
        t = open_clip.image_transform(32, mean=imagenet[0], std=imagenet[1], **kw)
        assert np.allclose(tuple(expected_stats(t)), imagenet)


@pytest.mark.parametrize('t', [
    v2.Compose([v2.ToImage(), v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, 'others': None}, scale=True), v2.Normalize(*imagenet)]),
    T.Compose([T.ToTensor(), T.ToPILImage(), T.ToTensor(), T.Normalize(*imagenet)]), T.Compose([T.ToTensor(), T.Normalize([0.], [1.]), T.Normalize(*imagenet)]),
    T.Compose([T.PILToTensor(), T.ConvertImageDtype(torch.float32), T.Normalize([.5], [.5])]), T.Compose([T.ToTensor(), T.Normalize([.5], [.5]), T.Normalize([.1], [.2])]),
    T.Compose([T.ToTensor(), T.Normalize([.5], imagenet[1])]), T.Compose([T.RandomApply([T.ToTensor()], p=1.), T.Normalize(*half)]),
    M.segmentation.DeepLabV3_ResNet50_Weights.DEFAULT.transforms(resize_size=8), T.Compose([M.ResNet18_Weights.DEFAULT.transforms(crop_size=8, resize_size=8)]),
])
def test_torchvision_acts_as_stated(t):
    assert same(expected_stats(t), told(t, x, to_pil), 1e-3)


@pytest.mark.parametrize('t,msg', [
    (T.Compose([T.ToTensor(), T.Normalize(*imagenet), T.ToPILImage()]), 'makes 8-bit integers'), (v2.Compose([T.ToTensor(), v2.ToDtype(torch.uint8)]), 'makes 8-bit integers'),
    (T.Compose([T.RandomApply([T.Normalize(*imagenet)])]), 'at random'), (T.RandomOrder([T.ToTensor(), T.Normalize(*imagenet)]), 'at random'),
    (v2.Compose([v2.ToDtype(torch.float32), v2.ColorJitter(.2), v2.Normalize(*deep)]), 'clips floats to .0,1., and receives pixels in 0-255'),
    (v2.Compose([v2.ToDtype(torch.int32), v2.Normalize(*deep)]), 'int32'), (T.Compose([T.RandomInvert(1.), T.ToTensor(), T.Normalize(*half)]), 'inverts every image'),
    (T.Compose([T.ToTensor(), T.Normalize([.5]*3, [.5, 0., .5])]), 'must not be 0'), (T.Compose([T.ToTensor(), T.Normalize([.5]*3, [.5]*2)]), 'received 2 for 3'),
])
def test_torchvision_that_no_constants_describe(t, msg):
    with pytest.raises(ValueError, match=msg): expected_stats(t)


@pytest.mark.parametrize('t', [T.Compose([T.ToTensor(), T.Normalize(*deep)]), [T.ToTensor(), T.Normalize(*deep)], T.Normalize(*deep), v2.Normalize(*deep), nn.Sequential(kornia.enhance.Normalize(*deep)),
                               A.Normalize(*deep), dict(mean=deep[0], std=deep[1]), deep])
def test_the_range_warning_comes_on_every_path(t):
    with pytest.warns(ExpectedStatsWarning, match='divide by 255, mean .0.485, 0.456, 0.406.'): expected_stats(t)


@pytest.mark.parametrize('t', [A.Normalize(*imagenet, max_pixel_value=1.), v2.Compose([v2.ToDtype(torch.float32), v2.Normalize(*imagenet)]),
                               v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32), v2.Normalize(*half)])])
def test_a_missing_division_by_255_is_said(t):
    with pytest.warns(ExpectedStatsWarning, match='hardly shifts pixels in 0-255') as ws: s = expected_stats(t)
    assert max(s.std) < .01 and 'hardly shifts' in s.notes[0] and ws[0].filename == __file__


# Registered types, and the internals that others ask

class Zoo:
    def __init__(self, norm): self.norm = norm

class ZooLayer(nn.Module):
    def forward(self, x): return (x-.5)/.25

class ZooNormalize(T.Normalize):
    def forward(self, x): return x*2-1

@pytest.fixture
def registered():
    expected_stats.register(Zoo, lambda o: o.norm)
    expected_stats.register(ZooLayer, lambda o: (.5, .25))
    expected_stats.register(ZooNormalize, lambda o: half)


def test_a_registered_type_works_inside_a_chain(registered):
    s = expected_stats(T.Compose([T.ToTensor(), Zoo('resnet50')]))
    assert tuple(s) == imagenet and 'timm' in s.source
    for t, want in ((nn.Sequential(ZooLayer(), v2.Normalize(*half)), Affine((.5,), (.25,)).then(Affine(*half))), ([T.ToTensor(), ZooNormalize(*imagenet)], Affine(*half)),
                    (A.Compose([A.Sequential([], p=1)]).transforms + [Zoo(half)], Affine(*half)), (T.Compose([NormStats(*imagenet), T.RandomErasing()]), Affine(*imagenet))):
        assert expected_stats(t).same(want, 1e-6) and chain_map(t).same(want, 1e-6)
    assert expected_stats([T.ToTensor(), ZooLayer()]).uniform and not expected_stats([T.ToTensor(), Zoo(((.5,), (.5,)))]).uniform
    with pytest.raises(ValueError, match='receives 8-bit pixels'): expected_stats([T.PILToTensor(), Zoo(half)])
    with pytest.raises(ValueError, match='ColorJitter comes after'): expected_stats([Zoo(half), T.ColorJitter(.1)])


@quiet
def test_fastai_normalize_in_a_chain():
    from fastai.data.transforms import Normalize
    assert expected_stats(T.Compose([T.ToTensor(), Normalize.from_stats(*imagenet, cuda=False)])).same(Affine(*imagenet), 1e-5)


def test_what_a_dataset_transform_does():
    plain = Affine((0.,), (1.,))
    for t, want in ((T.ToTensor(), plain), (T.Compose([T.Resize(8), T.ToTensor()]), plain), (T.Resize(8), Affine((0.,), (1/255,))), (T.PILToTensor(), Affine((0.,), (1/255,))),
                    (v2.ToDtype(torch.float32, scale=False), Affine((0.,), (1/255,))), (A.ToFloat(max_value=65535), plain), (A.Normalize(*half), Affine(*half)), ([], Affine((0.,), (1/255,)))):
        assert chain_map(t).same(want, 1e-9), t
    with pytest.raises(ValueError, match='halve does to pixels is not known'): chain_map(T.Compose([T.ToTensor(), halve]))


def test_teach_a_step():
    try:
        know(__name__, 'geometry', 'OwnCompose')
        assert expected_stats(T.Compose([OwnCompose(), T.ToTensor(), T.Normalize(*imagenet)])).mean == imagenet[0]
        know(__name__, lambda px, step: replace(px, factor=px.factor/2), 'halve')
        t = T.Compose([T.ToTensor(), halve, T.Normalize(*half)])
        assert same(expected_stats(t), told(t, x, to_pil))
    finally: known.pop(__name__)


def test_what_is_a_transform():
    for t in (T.Normalize(*half), A.Blur(), K.Resize(8), T.Compose([]), nn.Sequential(T.Resize(8)), [T.Resize(8)], M.ResNet18_Weights.DEFAULT.transforms()): assert is_transform(t)
    for o in (nn.ReLU(), nn.Sequential(), nn.Sequential(T.Normalize(*half), nn.Linear(1, 1)), [1, 2], 'resnet50', None, 3, M.resnet18, {}, OwnCompose()): assert not is_transform(o)


# Odd constants

odd = st.recursive(st.none() | st.booleans() | st.text(max_size=3) | st.floats() | st.integers() | st.binary(max_size=2) | st.just(10**400), lambda inner: st.lists(inner, max_size=3), max_leaves=4)

@quiet
@settings(deadline=None, max_examples=200)
@given(odd, odd, st.booleans())
def test_odd_constants_are_a_value_error_or_numbers(mean, std, kornias):
    class Fake: pass
    n, k = T.Normalize(*half), K.Normalize([.5]*3, [.5]*3)
    n.mean, n.std, k.flags = mean, std, dict(mean=mean, std=std)
    try: s = expected_stats([T.ToTensor(), k if kornias else n])
    except ValueError as e: assert 'Normalize' in str(e) or 'std' in str(e)
    else: assert all(isinstance(v, float) for v in s.mean+s.std)
