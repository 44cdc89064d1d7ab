"""Public reports about the normalization of pretrained image models, each rebuilt in miniature: what `stats_match` says of it.

The first part holds pipelines that were wrong, the second part pipelines that were right and were thought wrong (or look it).
Each test names its source; what happened there is told in our own words."""
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision import models as M, transforms as T

from fastai.vision.all import CategoryBlock, DataBlock, DataLoaders, ImageBlock, Normalize, RandomSplitter
from fastai_normx.all import StatsMatchWarning, data_stats, expected_stats, stats_match
from fastai_normx.expected import ExpectedStatsWarning
from fastai_normx.stats import DataStatsWarning

imagenet = (.485, .456, .406), (.229, .224, .225)
half = (.5,)*3, (.5,)*3
clip = (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)
cifar = (.4914, .4822, .4465), (.2023, .1994, .2010)
identity = (0.,)*3, (1.,)*3
vit = 'vit_base_patch16_224.augreg_in21k_ft_in1k'


# --- images, loaders, and what is asked of a report ---------------------------------------------------------------------

def photos(n=64, size=48):
    "Tiles of scikit-learn's two sample photographs, uint8 `[n,size,size,3]`"
    from sklearn.datasets import load_sample_images
    rng, ims = np.random.default_rng(0), load_sample_images().images
    at = [(ims[i % 2], rng.integers(0, 427-size), rng.integers(0, 640-size)) for i in range(n)]
    return np.stack([im[y:y+size, x:x+size] for im, y, x in at])


def column(v): return torch.tensor(v, dtype=torch.float32).view(-1, 1, 1)
def norm(x, mean, std): return (x-column(mean))/column(std)
def times255(c): return tuple(tuple(255*v for v in o) for o in c)
def of_255(mean, std): return tuple(tuple(v/255 for v in o) for o in (mean, std))
def pixels(n=64, size=48): return torch.from_numpy(photos(n, size)).permute(0, 3, 1, 2)
def unit(n=64, size=48): return pixels(n, size)/255
def resized(x, size=32): return interpolate(x, (size, size), mode='bilinear', antialias=True)


class Photos(Dataset):
    "Images with a `transform`, as torchvision's datasets have it"
    def __init__(self, images, transform): self.images, self.transform = images, transform
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.transform(self.images[i]), i % 2


def loader(transform, images=None): return DataLoader(Photos(photos() if images is None else images, transform), 16)
def batches(x): return DataLoader([(o, 0) for o in x], 16)


@contextmanager
def silent(*categories):
    with warnings.catch_warnings():
        for c in categories or (StatsMatchWarning, ExpectedStatsWarning): warnings.simplefilter('error', c)
        yield


def stats_of(source):
    "`expected_stats` without what it warns of"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ExpectedStatsWarning)
        return expected_stats(source)


def objects_to(source):
    "Does `expected_stats` refuse `source`, or warn of it?"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        try: expected_stats(source)
        except ValueError: return True
    return any(issubclass(w.category, ExpectedStatsWarning) for w in ws)


def assert_converted_or_warned(source):
    "Constants for 0-255 are divided by 255, or there is a warning"
    assert objects_to(source) or np.allclose(tuple(expected_stats(source)), of_255(*source), rtol=1e-4)


def assert_right(data, expected=None, outcomes=('ok',), **kw):
    "No warning, no mismatch, no finding above a note"
    with silent(StatsMatchWarning): r = stats_match(data, expected, **kw)
    assert r.outcome in outcomes, r
    assert all(f.severity == 'note' for f in r.findings), r
    return r


def assert_fault(kinds, data, expected=None, **kw):
    "A mismatch, and its worst finding is of one of `kinds`"
    r = stats_match(data, expected, warn=False, **kw)
    assert r.outcome == 'mismatch' and r.kind in kinds.split(), r
    return r


def noted(r): return {f.kind for f in r.findings}
never_a_mismatch = 'ok', 'cannot tell'


class Body(nn.Module):
    "A small backbone"
    def __init__(self, n_in=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(n_in, 8, 3, stride=2)
        self.rest = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    def forward(self, x): return self.rest(self.stem(x))


# === pipelines that were wrong ==========================================================================================

# --- the wrong range ----------------------------------------------------------------------------------------------------

def test_divided_by_255_after_a_conversion_that_divides():
    """GoogleCloudPlatform/asl-ml-immersion#424: prediction divided by 255 what the image decoder's conversion to float had
    scaled to [0,1] already, and nearly every flower became a dandelion."""
    x = resized(unit())/255
    assert_fault('wrong_range', batches(x), stats_of(identity))


def test_caffe_mean_subtracted_from_floats_in_0_to_1():
    """UofT-DSI/deep_learning#89: scikit-image's resize returns floats in [0,1], and Keras' caffe-style `preprocess_input`
    subtracted means around 110 from them."""
    caffe = (103.939, 116.779, 123.68), (1., 1., 1.)
    expected, bgr = stats_of(of_255(*caffe)), resized(unit()).flip(1)
    assert_fault('wrong_range', batches(norm(bgr, *caffe)), expected)
    assert_right(batches(norm(255*bgr, *caffe)), expected, never_a_mismatch)


def test_a_pretrained_resnet50_without_its_preprocessing():
    """9to5answer.com, "Keras: rescale=1./255 vs preprocessing_function=preprocess_input - which one to use": Keras' ResNet50, which
    expects caffe's preprocessing, was given pixels in [0,1] and saw a roundworm in every picture of cats and dogs."""
    assert_fault('not_normalized wrong_range', batches(unit()), stats_of(of_255((103.939, 116.779, 123.68), (1., 1., 1.))))


def test_a_processor_rescales_once_more():
    """huggingface/transformers#22392: without resizing, the image processor divided by 255 images that were in [0,1] already;
    with 8-bit images its output, a mapping that is no dict, is right."""
    processor = pytest.importorskip('transformers').ViTImageProcessor(do_resize=False)
    def processed(images): return [processor(images=list(x), return_tensors='pt') for x in images.split(16)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        twice, once = processed(resized(unit())), processed(pixels())
    assert_right(once, processor)
    assert_fault('wrong_range', twice, processor)


def test_12_bit_pictures_in_16_bits():
    """raspberrypi/picamera2#311: a camera's 12-bit numbers in a 16-bit file look black, because white is 65535 there; for a network
    the same division leaves a sixteenth of [0,1]. Divided by 255 they are sixteen times too large."""
    rng = np.random.default_rng(5)
    twelve = torch.from_numpy((photos().astype(np.float32)*16 + rng.integers(0, 16, photos().shape))).permute(0, 3, 1, 2).float()
    for divisor in (65535, 255):
        r = assert_fault('wrong_range', batches(norm(twelve/divisor, *imagenet)), 'resnet18')
        assert '12 bit' in str(r).replace('-', ' ').replace('\n', ' '), r
    assert_right(batches(norm(twelve/4095, *imagenet)), 'resnet18', never_a_mismatch)


def test_a_preset_that_scales_integers_only():
    """pytorch/vision#8984 (and #9425): the presets of the weights scale pixels to [0,1] only if these are integers, so that floats
    in 0-255 come out 255 times too large; VGG16's feature weights, with a std of 1/255, are right as they are."""
    for entry in (M.AlexNet_Weights.IMAGENET1K_V1, M.VGG16_Weights.IMAGENET1K_FEATURES):
        preset = entry.transforms(crop_size=40, resize_size=40)
        assert_right(batches(preset(pixels(64))), entry, never_a_mismatch)
        assert_fault('wrong_range', batches(preset(pixels(64).float())), entry)


def test_normalize_on_pixels_in_0_to_255():
    """j96w/DenseFusion#39: the cropped images went through torchvision's `Normalize` without having been scaled, and the values
    reached 1029."""
    def transform(im): return T.Normalize(*imagenet)(torch.from_numpy(im.astype(np.float32)).permute(2, 0, 1))
    assert_fault('wrong_range', loader(transform), 'resnet18')


def test_constants_of_the_wrong_scale_for_a_gpu_loader():
    """NVIDIA/DALI#3994 (and NVIDIA/apex#21): CLIP's constants for [0,1] were given to an operator that works on 0-255; with
    both multiplied by 255, as NVIDIA/DALI#3845 advises, all is well."""
    x = pixels().float()
    assert_fault('wrong_range', batches(norm(x, *clip)), 'vit_base_patch32_clip_224.openai')
    assert_right(batches(norm(x, *times255(clip))), 'vit_base_patch32_clip_224.openai')
    assert_converted_or_warned(times255(clip))


def test_mean_of_another_framework_and_no_std():
    """osmr/imgclsmob#51: someone subtracted caffe's BGR mean from images in 0-255 and divided by nothing; the PyTorch weights
    expected ImageNet's constants for [0,1], and every answer was wrong."""
    x = norm(pixels().float().flip(1), (104., 117., 124.), (1., 1., 1.))
    assert_fault('wrong_range', batches(x), 'resnet18')


def test_16_bit_colour_divided_by_255():
    """Nerogar/mgds#55: `read_image` returned a 16-bit PNG as uint16, the loader divided by 255, and the model saw values up
    to 257."""
    deep = (photos().astype(np.uint16) << 8) + np.random.default_rng(1).integers(0, 256, photos().shape, dtype=np.uint16)
    x = torch.from_numpy(deep.astype(np.float32)).permute(0, 3, 1, 2)
    assert_fault('wrong_range', batches(x/255), stats_of(identity))
    assert_right(batches(x/65535), stats_of(identity), never_a_mismatch)


@pytest.fixture
def grey_16_bit(tmp_path):
    "A folder of 16-bit grey PNG files"
    for i, im in enumerate(photos(24)): Image.fromarray(im[..., 1].astype(np.uint16)*257).save(tmp_path/f'{i}.png')
    return tmp_path


def test_16_bit_grey_files_turn_white(grey_16_bit):
    """python-pillow/Pillow#3011 (met again in unslothai/unsloth#10094): `convert` clips a 16-bit grey file at 255, so that all
    but black is white."""
    with pytest.warns(DataStatsWarning, match='8 bits'): data_stats(grey_16_bit)
    r = assert_fault('wrong_range', grey_16_bit, 'resnet18')
    assert '8 bits' in r.findings[0].message


def test_16_bit_grey_files_turn_white_in_fastai(grey_16_bit):
    "python-pillow/Pillow#3011 again: fastai's `ImageBlock` loads the same clipped pixels."
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(p.iterdir()), get_y=lambda f: int(f.stem) % 2,
                      splitter=RandomSplitter(.3, seed=1), batch_tfms=[Normalize.from_stats(*imagenet)])
    dls = block.dataloaders(grey_16_bit, bs=8, num_workers=0)
    r = assert_fault('wrong_range', dls, 'resnet18')
    assert '8 bits' in r.findings[0].message
    with pytest.warns(DataStatsWarning, match='8 bits'): data_stats(dls)


def sentinel():
    "Reflectances as Sentinel-2 delivers them, integers of which 10,000 is 1"
    rng = np.random.default_rng(2)
    dn = 250 + photos().astype(float)*10 + rng.normal(0, 20, photos().shape)
    return torch.from_numpy(dn.round().clip(0).astype(np.float32)).permute(0, 3, 1, 2)


def test_reflectances_divided_by_255():
    """torchgeo/torchgeo#4061: the base class' division by 255 was applied to Sentinel-2 reflectances, which are thousands, and
    what should be near [0,1] came out some ten times too large."""
    assert_fault('wrong_range', batches(sentinel()/255), stats_of(identity))


def test_colour_jitter_after_normalize():
    """mlfoundations/open_flamingo#156: `ColorJitter` stood behind CLIP's normalization; on tensors it clips its results to [0,1],
    so that everything darker than the mean became one value."""
    transform = T.Compose([T.ToTensor(), T.Normalize(*clip), T.ColorJitter(brightness=.5, hue=.3)])
    torch.manual_seed(0)
    assert_fault('wrong_range', loader(transform), 'vit_base_patch32_clip_224.openai')


def test_kornia_augmentation_after_standardization():
    """torchgeo/torchgeo#3997: kornia's `RandomBrightness` clips to [0,1], and stood behind a standardization, so that more than half
    of EuroSAT's values became 0 or 1."""
    K = pytest.importorskip('kornia.augmentation')
    torch.manual_seed(0)
    brightness = K.RandomBrightness((.8, 1.2), p=1.)
    assert_fault('wrong_range', batches(brightness(norm(unit(), *imagenet))), 'resnet18')
    assert_right(batches(norm(brightness(unit()), *imagenet)), 'resnet18', never_a_mismatch)


# --- the wrong constants ------------------------------------------------------------------------------------------------

def test_imagenet_constants_on_google_vit(tmp_path):
    """microsoft/Olive#1781: an example normalized ImageNet's validation set for Google's ViT with ImageNet's constants; with 0.5,
    which its config states, accuracy went from .77 to .82."""
    for i, im in enumerate(photos(40)): Image.fromarray(im).save(tmp_path/f'{i}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(p.iterdir()), get_y=lambda f: int(f.stem) % 2,
                      splitter=RandomSplitter(.3, seed=1), batch_tfms=[Normalize.from_stats(*imagenet)])
    dls = block.dataloaders(tmp_path, bs=8, num_workers=0)
    r = assert_fault('wrong_stats', dls, vit)
    assert 'normalize_for' in r.findings[0].fix
    r.fix()
    assert_right(dls, vit)


def test_constants_of_the_own_data_in_fastai():
    """forums.fast.ai, "Why do we normalize with imagenet stats when fine-tuning?": the question that every course brings up; the
    answer given is that the weights need those they were trained with, and a bare `Normalize()` takes the data's own."""
    images = photos(40)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: images[i], get_y=lambda i: i % 2,
                      splitter=RandomSplitter(.3, seed=1), batch_tfms=[Normalize()])
    dls = block.dataloaders(list(range(40)), bs=8, num_workers=0)
    assert_fault('wrong_stats', dls, 'resnet18').fix()
    assert_right(dls, 'resnet18')


def test_vit_without_normalization():
    """Yangsenqiao/vida#14: a robustness benchmark's transform, which does not normalize, was used for a timm ViT; a reader saw
    its error fall from 55.8 to 49.8 with 0.5/0.5."""
    assert_fault('not_normalized', loader(T.Compose([T.ToPILImage(), T.Resize(40), T.ToTensor()])), vit)


def test_mean_divided_before_it_is_subtracted():
    "wkentaro/osam#83: a pair of parentheses was missing, so that `mean/std` was subtracted and nothing was divided."
    shift = tuple(m/s for m, s in zip(*imagenet))
    assert_fault('wrong_stats', batches(unit()-column(shift)), imagenet)


def test_divided_by_the_mean():
    "XiaLiPKU/EMANet#7: the images were divided by the mean, not by the std."
    assert_fault('wrong_stats', batches(norm(unit(), imagenet[0], imagenet[0])), imagenet)


def test_variance_and_std_confused():
    """tensorflow/tensorflow#49930: a normalization layer takes variances and was given stds, so that it divided by their square
    roots."""
    root = tuple(s**.5 for s in imagenet[1])
    assert_fault('wrong_stats', batches(norm(unit(), imagenet[0], root)), 'efficientnet_b0')


def test_reversed_mean_on_images_in_rgb():
    """wutianyiRosun/CGNet#8: the image was turned from BGR to RGB, and then the mean in the order BGR was subtracted; the values
    show it, whatever the colours."""
    mean = 123.68, 116.779, 103.939
    x = norm(pixels().float(), mean[::-1], (1., 1., 1.))
    assert_fault('channel_order', batches(x), stats_of(of_255(mean, (1., 1., 1.))))


def test_normalized_by_the_dataset_and_by_the_prefetcher():
    """tczhangzhi/pytorch-distributed#11: the dataset's transform normalized, and the prefetcher, which expects 0-255, did it
    again."""
    once = loader(T.Compose([T.ToTensor(), T.Normalize(*imagenet)]))
    twice = [norm(x, *times255(imagenet)) for x, _ in once]
    assert_fault('normalized_twice wrong_range', twice, 'resnet18')


def test_normalized_by_two_stages():
    """hao-ai-lab/FastVideo#1055: a transform that ended with a normalization was followed by a stage that scaled and normalized
    once more, and the images were black."""
    x = norm(unit(), *half)
    assert_fault('normalized_twice wrong_range', batches(norm(x/255, *half)), stats_of(half))
    assert_fault('normalized_twice', batches(norm(x, *half)), stats_of(half))


def test_columns_instead_of_channels():
    """GewelsJI/VPS#51: a video transform normalized along the last axis of frames that were `[C,H,W]` already: three columns of
    pixels instead of three channels."""
    x = unit(64, 128)
    for i, (m, s) in enumerate(zip(*imagenet)): x[..., i] = (x[..., i]-m)/s
    assert stats_match(batches(x), 'resnet18', warn=False).outcome != 'ok'


def test_training_set_normalized_test_set_not():
    "JeasunLok/ResNet-pytorch#1: only the training set was normalized, and the accuracy on the test set was low."
    train, test = loader(T.Compose([T.ToTensor(), T.Normalize(*imagenet)])), loader(T.ToTensor())
    r = assert_fault('split_mismatch', DataLoaders(train, test), 'resnet18')
    assert 'validation set' in str(r)


def test_features_from_images_standardized_one_by_one():
    """rmaphoh/RETFound#53: a notebook standardizes every image by its own mean and std, and the training code normalizes with
    ImageNet's constants."""
    def transform(im):
        x = T.functional.to_tensor(im)
        return (x-x.mean((1, 2), keepdim=True))/x.std((1, 2), keepdim=True)
    r = stats_match(loader(transform), 'vit_large_patch16_224.mae', warn=False)
    assert r.kind == 'wrong_stats' and 'by its own mean' in r.findings[0].message, r
    albumentations = pytest.importorskip('albumentations')
    with pytest.raises(ValueError): expected_stats(albumentations.Compose([albumentations.Normalize(normalization='image_per_channel')]))


# --- channels and values ------------------------------------------------------------------------------------------------

def test_one_channel_made_three_by_broadcasting():
    """huggingface/pytorch-image-models#1123: the prefetcher's constants had three channels for MNIST's one, and broadcasting made
    three of it."""
    x = norm(unit()[:, 1:2], *imagenet)
    assert x.shape[1] == 3
    assert_fault('channel_count', batches(x), expected_stats('resnet18', n_in=1))


def test_grey_loaded_into_one_of_three_channels():
    """MouseLand/cellpose#1404: single-channel images fill the first channel only, and the paper says that they are repeated in
    all three."""
    x = unit()*column((1., 0., 0.))
    r = stats_match(batches(x), stats_of(identity), warn=False)
    assert 'constant_channel' in noted(r), r


def test_flat_images_stretched_to_their_own_range():
    """avalonstrel/GatedConvolution_pytorch#27: images were stretched between their least and greatest value, and a flat one
    became NaN, then the loss."""
    x = unit()
    x[3] = .5
    lo, hi = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    assert_fault('non_finite', batches(2*(x-lo)/(hi-lo)-1), stats_of(half))


# --- normalization inside the model -------------------------------------------------------------------------------------

class NormalizeLayer(nn.Module):
    "Constants under other names, held as plain tensors"
    def __init__(self, means, sds):
        super().__init__()
        self.means, self.sds = torch.tensor(means), torch.tensor(sds)
    def forward(self, x):
        size = x.shape[0], x.shape[1], *x.shape[2:]
        return (x-self.means.view(1, -1, 1, 1).expand(size))/self.sds.view(1, -1, 1, 1).expand(size)


def test_normalized_input_for_a_model_with_a_normalize_layer():
    """locuslab/smoothing#12: a layer in front of the network normalizes; a reader fed it normalized images, and it failed on
    all."""
    model = nn.Sequential(NormalizeLayer(*cifar), Body())
    assert_right(batches(unit()), cifar, model=model)
    assert_fault('in_model', batches(norm(unit(), *cifar)), cifar, model=model)


def test_normalization_in_the_forward_of_a_subclass():
    """fra31/auto-attack#13: for attacks on [0,1] the constants went into the `forward` of a subclass of the network, which has
    no layer of its own for them."""
    class InUnit(Body):
        def __init__(self):
            super().__init__()
            self.mu, self.sigma = column(cifar[0]), column(cifar[1])
        def forward(self, x): return super().forward((x-self.mu)/self.sigma)
    assert_right(batches(unit()), cifar, model=InUnit())
    assert_fault('in_model', batches(norm(unit(), *cifar)), cifar, model=InUnit())


def test_minus_one_to_one_for_an_encoder_that_normalizes():
    """real-stanford/diffusion_policy#45: the dataset's normalizer maps images to [-1,1], and the observation encoder applies
    ImageNet's constants to them."""
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.key_transform_map = nn.ModuleDict(dict(camera=nn.Sequential(nn.Identity(), nn.Identity(), T.Normalize(*imagenet))))
            self.key_model_map = nn.ModuleDict(dict(camera=Body()))
        def forward(self, x): return self.key_model_map['camera'](self.key_transform_map['camera'](x))
    assert_right(batches(unit()), 'resnet18', model=Encoder())
    assert_fault('in_model', batches(norm(unit(), *half)), 'resnet18', model=Encoder())


def test_normalized_images_for_a_detector():
    """alankbi/detecto#16: torchvision's detectors normalize inside; with images that were normalized before, a model with its
    published weights found hardly anything."""
    model = M.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    assert_right(batches(unit(16)), None, model=model)
    assert_fault('in_model', batches(norm(unit(16), *imagenet)), None, model=model)


class Rescaling(nn.Module):
    def forward(self, x): return x/255


def test_pixels_scaled_for_a_model_that_scales():
    """Priyanshu-byte-coder/devtrack#927 (tensorflow/tensorflow#48412 is the same surprise): the model starts with a layer that
    divides by 255, and inference divided before it."""
    model = nn.Sequential(Rescaling(), NormalizeLayer(*imagenet), Body())
    assert_right(batches(pixels().float()), 'resnet18', model=model)
    assert_fault('in_model wrong_range', batches(unit()), 'resnet18', model=model)


class Sam(nn.Module):
    "Takes pixels in 0-255 and normalizes them in a method of its own"
    def __init__(self):
        super().__init__()
        self.image_encoder = Body()
        self.register_buffer('pixel_mean', column(times255(imagenet)[0]), False)
        self.register_buffer('pixel_std', column(times255(imagenet)[1]), False)
    def preprocess(self, x): return (x-self.pixel_mean)/self.pixel_std
    def forward(self, x): return self.image_encoder(self.preprocess(x))


def test_medical_images_for_segment_anything():
    """yuhoo0302/Segment-Anything-Model-for-Medical-Images#14: each image is stretched to 0-255, then the model's own `preprocess`
    normalizes; a reader asked whether both belong there, and they do. Pixels in [0,1] would be wrong."""
    x = resized(unit())
    lo, hi = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    stretched = (x-lo)/(hi-lo)
    assert_right(batches(255*stretched), imagenet, never_a_mismatch, model=Sam())
    assert_fault('in_model wrong_range', batches(stretched), imagenet, model=Sam())


# === pipelines that were right ==========================================================================================

# --- the range looks wrong ----------------------------------------------------------------------------------------------

def test_float_arrays_pass_through_to_tensor():
    """timesler/facenet-pytorch#89: `(x-127.5)/128` after `ToTensor` looks like a mistake, and is none, because `np.float32` before
    it keeps `ToTensor` from dividing. Without that step it would be one."""
    def standardize(x): return (x-127.5)/128
    s = stats_of(((.5,)*3, (128/255,)*3))
    right = T.Compose([np.float32, T.ToTensor(), standardize])
    assert_right(loader(right), s)
    with pytest.raises(ValueError): expected_stats(right)
    assert_fault('wrong_range', loader(T.Compose([T.ToTensor(), T.Resize(32), standardize])), s)


def test_a_to_tensor_of_their_own_that_does_not_divide():
    """kenshohara/video-classification-3d-cnn-pytorch#63: means around 110 and a std of 1 after `ToTensor`; the project's own
    `ToTensor` leaves clips in 0-255, and the weights were trained so."""
    kinetics = (114.7748, 107.7354, 99.4750), (1., 1., 1.)
    class ToTensor:
        def __call__(self, im): return torch.from_numpy(im.astype(np.float32)).permute(2, 0, 1)
    frames = torch.stack([T.Compose([ToTensor(), T.Normalize(*kinetics)])(im) for im in photos(64)])
    clips = frames.view(16, 4, 3, 48, 48).transpose(1, 2)
    assert_converted_or_warned(kinetics)
    assert_right(batches(clips), stats_of(of_255(*kinetics)))
    with pytest.raises(ValueError): expected_stats(T.Compose([ToTensor(), T.Normalize(*kinetics)]))


def test_the_prefetcher_normalizes_instead_of_the_transform():
    """huggingface/pytorch-image-models#112 (and #73): constants appear in the transform and in the prefetcher, and only one of
    them is used; on the GPU it is done in half precision, on 0-255."""
    m, s = (column(o).half() for o in times255(imagenet))
    assert_right([x.half().sub_(m).div_(s) for x in pixels().split(16)], 'resnet18')


def test_ten_bits_divided_by_1020():
    """aiff22/PyNET#2: 10-bit sensor images are divided by 4*255, which looks too large for dark crops whose values all fit into
    8 bits, and leaves white a little above 1; the authors say that it is meant."""
    ten = torch.from_numpy(photos().astype(np.float32)*4 + np.random.default_rng(3).integers(0, 4, photos().shape)).permute(0, 3, 1, 2)
    ten[:8] = (ten[:8]/4).round()
    assert_right(batches(ten.float()/1020), stats_of(identity), never_a_mismatch)


def test_reflectances_as_images():
    """torchgeo/torchgeo-bench#159: Sentinel-2 reflectances are divided by 10,000 before ImageNet's constants; they are dark, and
    lie on no 8-bit lattice."""
    assert_right(batches(norm(sentinel()/10_000, *imagenet)), 'resnet18', never_a_mismatch)


def test_x_rays_in_plus_minus_1024():
    """mlmed/torchxrayvision#9 (its warning: #90): images span [-1024,1024], not [0,1] and not mean 0, std 1, and this is what the
    weights expect."""
    grey = unit()[:, 1:2]
    xrv = (.5,), (1/2048,)
    assert_right(batches((2*grey-1)*1024), stats_of(xrv))
    assert_fault('not_normalized wrong_range', batches(grey), stats_of(xrv))


def test_augmented_beyond_black_and_white():
    """hanhung/PureCLIPNeRF#5: differentiable augmentation leaves [0,1] widely before CLIP's constants are applied; the authors had
    tried to clip, and it made the results worse."""
    torch.manual_seed(0)
    def rand(): return torch.rand(64, 1, 1, 1)
    x = unit() + rand()-.5
    x = (x-x.mean(1, keepdim=True))*rand()*2 + x.mean(1, keepdim=True)
    x = (x-x.mean((1, 2, 3), keepdim=True))*(rand()+.5) + x.mean((1, 2, 3), keepdim=True)
    f, = stats_match(batches(norm(x, *clip)), 'vit_base_patch32_clip_224.openai', warn=False).findings
    assert f.severity == 'warning' and 'The values do not fit' in f.message  # meant or not: the backbone has never seen them


# --- the constants look wrong -------------------------------------------------------------------------------------------

def test_half_for_a_vit_trained_on_imagenet():
    """isl-org/DPT#13: 0.5/0.5 looks wrong for a backbone that was trained on ImageNet, and is what Google's ViT was trained
    with."""
    assert_right(loader(T.Compose([T.ToTensor(), T.Normalize(*half)])), vit)


def test_constants_of_the_dataset_that_the_weights_were_trained_on():
    """CoinCheung/BiSeNet#174: unusual constants, computed from Cityscapes, belong to weights that were trained with them; the
    reader's own image statistics made the result bad."""
    city = (.3257, .3690, .3223), (.2112, .2148, .2115)
    with silent(): s = expected_stats(city)
    assert_right(loader(T.Compose([T.ToTensor(), T.Normalize(*city)])), s)
    own = tuple(unit().mean((0, 2, 3)).tolist()), tuple(unit().std((0, 2, 3)).tolist())
    assert_fault('wrong_stats', loader(T.Compose([T.ToTensor(), T.Normalize(*own)])), s)


def test_no_normalization_and_grey_borders():
    """ultralytics/ultralytics#1279: images are only divided by 255 and padded with 114; nothing is missing, since the model expects
    [0,1], and the grey is meant."""
    def letterbox(im):
        x = np.asarray(Image.fromarray(im[:32]).resize((40, 27), Image.Resampling.BILINEAR))
        return np.pad(x, ((6, 7), (0, 0), (0, 0)), constant_values=114)
    with silent(): s = expected_stats(identity)
    assert_right(loader(T.Compose([letterbox, T.ToTensor()])), s)


def test_a_normalize_that_only_divides():
    """albumentations-team/albumentations#973: `Normalize(mean=0, std=1)` looks like a step without effect, and is the library's way
    to divide by 255."""
    A = pytest.importorskip('albumentations')
    only = A.Normalize(mean=(0, 0, 0), std=(1, 1, 1))
    with silent(): s = expected_stats(A.Compose([only]))
    assert tuple(s) == identity
    def transform(im): return torch.from_numpy(only(image=im)['image']).permute(2, 0, 1)
    assert_right(loader(transform), s)


def test_16_bit_constants_for_albumentations():
    """albumentations-team/albumentations#302: mean and std in units of the 16-bit data, with `max_pixel_value=65535`, are multiplied
    by it once more; the reader got sense only with `max_pixel_value=1`."""
    A = pytest.importorskip('albumentations')
    mean, std = (20000.,)*3, (8000.,)*3
    assert objects_to(A.Normalize(mean, std, max_pixel_value=65535))
    with silent(): s = expected_stats(A.Normalize([m/65535 for m in mean], [m/65535 for m in std], max_pixel_value=65535))
    assert np.allclose(s.mean, 20000/65535) and np.allclose(s.std, 8000/65535)


def test_one_constant_for_three_channels():
    "pytorch/vision#288: `Normalize((0.5,), (0.5,))` for grey images; torchvision broadcasts it over three channels as well."
    one = T.Normalize((.5,), (.5,))
    for channels in (slice(1, 2), slice(None)):
        x = unit()[:, channels]
        r = assert_right(batches(one(x)), expected_stats(((.5,)*x.shape[1], (.5,)*x.shape[1])))
        assert not noted(r) & {'channel_count'}
    assert_right(loader(T.Compose([T.ToTensor(), one])), T.Compose([T.ToTensor(), one]))


def test_caffe_constants_and_bgr():
    """ucbdrive/few-shot-object-detection#119 (the order: facebookresearch/moco#117): a std of 1 leaves large values, because
    the first layer's weights have absorbed it, and the images are in the order BGR, as these weights expect."""
    bgr = (103.530, 116.280, 123.675), (1., 1., 1.)
    assert_converted_or_warned(bgr)
    r = assert_right(batches(norm(pixels().float().flip(1), *bgr)), stats_of(of_255(*bgr)))
    assert 'channel_order' not in noted(r)


# --- the images look wrong ----------------------------------------------------------------------------------------------

def test_bgr_images_with_rgb_constants():
    """microsoft/human-pose-estimation.pytorch#73: OpenCV loads BGR, and the constants are RGB's; only the colours could show it,
    so no more than a note may be made of it."""
    r = assert_right(batches(norm(unit().flip(1), *imagenet)), 'resnet18')
    assert noted(r) <= {'channel_order', 'domain_shift'}


def test_grey_x_rays_in_three_channels():
    """brucechou1983/CheXNet-Keras#17: grey images, repeated in three channels, are normalized with three different constants; the
    paper's authors do the same."""
    grey = np.repeat(photos()[..., 1:2], 3, -1)
    r = assert_right(loader(T.Compose([T.ToTensor(), T.Normalize(*imagenet)]), grey), 'densenet121')
    assert noted(r) <= {'domain_shift'}


def test_three_windows_of_a_ct_as_colours():
    """seungjunlee96/emergency-triage-of-brain-computed-tomography-via-anomaly-detection-with-a-deep-generative-model#9:
    red, green and blue are three windows of the same Hounsfield units, so that their ranges differ by design."""
    hu = np.random.default_rng(4).normal(0, 3, photos()[..., 1].shape) + photos()[..., 1]*.7-40
    windows = (5, 55), (0, 80), (-20, 180)
    rgb = np.stack([255*((hu-a)/(b-a)).clip(0, 1) for a, b in windows], -1).round().astype(np.uint8)
    r = assert_right(loader(T.Compose([T.ToTensor(), T.Normalize(*imagenet)]), rgb), 'resnet18')
    assert noted(r) <= {'channel_order', 'domain_shift'}


def test_zeros_padded_after_normalization():
    """hysts/pytorch_image_classification#2: padding and cropping come after `Normalize`, so that the borders are the mean colour
    and not black; both orders are in use."""
    torch.manual_seed(0)
    transform = T.Compose([T.ToTensor(), T.Normalize(*cifar), T.RandomCrop(48, padding=6)])
    assert_right(loader(transform), cifar)


def test_random_erasing_after_normalization():
    """pytorch/vision#909: `RandomErasing` is meant to come after `Normalize` and may fill with normal noise, beyond black and
    white."""
    torch.manual_seed(0)
    transform = T.Compose([T.ToTensor(), T.Normalize(*imagenet), T.RandomErasing(1., value='random')])
    assert_right(loader(transform), 'resnet18')


# --- the model looks as if it normalized twice --------------------------------------------------------------------------

@pytest.mark.parametrize('make, entry', [(M.googlenet, 'GoogLeNet_Weights.IMAGENET1K_V1'),
                                         (M.inception_v3, 'Inception_V3_Weights.IMAGENET1K_V1')])
def test_transform_input_belongs_to_the_model(make, entry):
    """pytorch/vision#4136: GoogLeNet transforms its input without being told, which looks like a second normalization; it turns
    ImageNet's constants, which it expects, into those of its weights."""
    model = make(weights=None, transform_input=True, init_weights=False)
    assert_right(batches(norm(unit(32, 96), *imagenet)), entry, model=model)
    assert_fault('not_normalized', batches(unit(32, 96)), entry, model=model)


def test_without_transform_input():
    "LightDXY/GreedyFool#3: 0.5/0.5 for torchvision's Inception is right once its own `transform_input` is taken out."
    model = M.inception_v3(weights=None, transform_input=False, init_weights=False)
    assert_right(batches(norm(unit(32, 96), *half)), half, model=model)
    assert_fault('wrong_stats', batches(norm(unit(32, 96), *imagenet)), half, model=model)


def test_scaling_layer_for_images_in_minus_one_to_one():
    """richzhang/PerceptualSimilarity#20: 0.5/0.5 in the dataset, and in the model a shift and a scale that are nobody's constants;
    together they are ImageNet's."""
    class ScalingLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('shift', column((-.030, -.088, -.188)))
            self.register_buffer('scale', column((.458, .448, .450)))
        def forward(self, x): return (x-self.shift)/self.scale
    model = nn.Sequential(ScalingLayer(), Body())
    assert_right(batches(norm(unit(), *half)), 'squeezenet1_1', model=model)
    assert_fault('in_model', batches(norm(unit(), *imagenet)), 'squeezenet1_1', model=model)


def test_constants_in_two_places_of_which_one_is_undone():
    """cassidylaidlaw/perceptual-advex#2: an attack normalizes and the model does as well, and the wrapper takes the attack's
    normalization out before."""
    model = nn.Sequential(NormalizeLayer(*imagenet), Body())
    x = norm(unit(), *imagenet)*column(imagenet[1]) + column(imagenet[0])
    assert_right(batches(x), 'resnet18', model=model)
