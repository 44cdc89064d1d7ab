"Pipelines of fastai as users build them: transforms that cannot be read, other depths, and two sets that tell different halves of a story."
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader as TorchDL, TensorDataset

from fastai.vision.all import (CategoryBlock, DataBlock, DataLoaders, Datasets, ImageBlock, IntToFloatTensor, Normalize, PILImage, RandomSplitter, TensorImage, Transform,
                               aug_transforms, imagenet_stats)
from fastai_normx.all import expected_stats, stats_match
from fastai_normx.pipeline import testimony as said_of

H = ((.5,)*3, (.5,)*3)
half = 'tf_efficientnet_lite0'


def norm(x, mean, std): return (x-torch.tensor(mean).view(-1, 1, 1))/torch.tensor(std).view(-1, 1, 1)


def tiles(n=64, size=32):
    from sklearn.datasets import load_sample_images
    rng, ims = np.random.default_rng(0), load_sample_images().images
    at = [(ims[i % 2], rng.integers(0, 427-size), rng.integers(0, 640-size)) for i in range(n)]
    return np.stack([im[y:y+size, x:x+size] for im, y, x in at])


def pale(px): return (px*.45+135).astype(np.uint8)
def loaders(*batch_tfms, px=None, item_tfms=None, get_x=None):
    px = tiles() if px is None else px
    block = DataBlock((ImageBlock, CategoryBlock), get_x=get_x or (lambda i: px[i]), get_y=lambda i: i % 2, splitter=RandomSplitter(.5, seed=0), item_tfms=item_tfms, batch_tfms=list(batch_tfms))
    return block.dataloaders(range(len(px)), bs=16, num_workers=0)


class Halves(Transform):
    "A user's own normalization, before where fastai's would stand"
    order = 98
    def encodes(self, x: TensorImage): return (x-.5)/.5


class Nothing(Transform):
    order = 98
    def encodes(self, x: TensorImage): return x


def blurred(x: TensorImage): return interpolate(interpolate(x, 31, mode='bilinear'), 32, mode='bilinear')
blurred.order = 97
def halved(x: TensorImage): return (x-.5)*2
halved.order = 98


# --- a transform that cannot be read voids what the pipeline says -------------------------------------------------------

@pytest.mark.parametrize('own', [Halves, lambda: halved], ids=['class', 'function'])
@pytest.mark.parametrize('look', [lambda px: px, pale], ids=['photographs', 'pale'])
@pytest.mark.parametrize('blur', [[], [blurred]], ids=['levels', 'floats'])
def test_own_normalization_is_not_taken_for_none(own, look, blur):
    "The pipeline holds no `Normalize`, and the pixels are normalized all the same"
    dls = loaders(*blur, own(), px=look(tiles()))
    r = dls.stats_match(half, warn=False)
    assert r.outcome != 'mismatch', r
    assert said_of(dls.train, 3).unknown and not said_of(dls.train, 3).trusted
    if not blur: assert r.ok


def test_own_normalization_and_fastais():
    "Twice, and the fix must not promise what `normalize_for` cannot do"
    dls = loaders(Halves(), Normalize.from_stats(*H))
    r = dls.stats_match(half, warn=False)
    f = r.findings[0]
    assert r.kind == 'normalized_twice' and not f.code and f.fix.startswith('`Halves` changes the images before the model: take that out')
    with pytest.raises(ValueError, match='take that out'): r.fix()


def test_own_transform_that_scales():
    "Not far from what the pipeline states, and still not what `normalize_for` could mend"
    class Brighter(Transform):
        order = 98
        def encodes(self, x: TensorImage): return x*1.3
    r = loaders(Brighter(), Normalize.from_stats(*H)).stats_match(half, warn=False)
    f = r.findings[0]
    assert r.kind == 'wrong_stats' and not f.code and f.fix.startswith('`Brighter` changes the images')


def test_own_transforms_that_change_nothing():
    assert loaders(Nothing(), Normalize.from_stats(*H)).stats_match(half).ok
    assert loaders(Nothing(), *aug_transforms(), Normalize.from_stats(*H)).stats_match(half, warn=False).outcome != 'mismatch'


def test_own_transforms_of_pillow_images_keep_the_testimony():
    "Bytes go into `after_batch`, whatever was done to them before"
    class Flipped(Transform):
        def encodes(self, x: PILImage): return PILImage.create(np.asarray(x)[:, ::-1].copy())
    dls = loaders(*aug_transforms(), Normalize.from_stats(*H), item_tfms=Flipped())
    assert said_of(dls.train, 3).trusted and dls.stats_match(half).ok


def test_a_subclass_that_changes_nothing_is_read():
    class Mine(Normalize): pass
    assert loaders(Mine.from_stats(*H)).stats_match(half).ok
    assert loaders(*aug_transforms(), Mine.from_stats(*imagenet_stats)).stats_match(half, warn=False).kind == 'wrong_stats'


# --- other depths -------------------------------------------------------------------------------------------------------

def deep_loaders(bits, div, *tfms):
    "Images of `bits` bits, as integers, and fastai's own transforms"
    rng = np.random.default_rng(0)
    px = tiles().astype(np.int32)
    if bits > 8: px = px*2**(bits-8)+rng.integers(0, 2**(bits-8), px.shape)
    def get(i): return TensorImage(torch.tensor(px[i]).permute(2, 0, 1).to(torch.uint8 if bits == 8 else torch.int32))
    return Datasets(range(len(px)), [[get], [lambda i: i % 2]]).dataloaders(bs=16, after_batch=[IntToFloatTensor(div=div), *tfms], num_workers=0)


@pytest.mark.parametrize('bits,div,said', [(16, 65535, ''), (12, 4095, ''), (10, 1023, ''), (8, 255, ''), (8, 65535, 'wrong_range'), (12, 65535, '12 bits'), (12, 255, '12 bits'),
                                           (10, 255, '10 bits'), (16, 255, 'wrong_range'), (8, 1, 'wrong_range'), (8, 255*255, 'wrong_range')])
def test_integers_of_any_depth(bits, div, said):
    dls = deep_loaders(bits, div, Normalize.from_stats(*imagenet_stats))
    r = dls.stats_match('resnet18', warn=False)
    if not said:
        assert r.ok, r
        return
    assert r.kind == 'wrong_range' and (said == r.kind or said in r.findings[0].message), r
    if bits == 8:
        exec(r.findings[0].code, dict(dls=dls))
        assert dls.stats_match('resnet18').ok


# --- two sets -----------------------------------------------------------------------------------------------------------

def loader(x): return TorchDL(TensorDataset(x, torch.zeros(len(x))), 16)
def chw(px): return torch.tensor(px).permute(0, 3, 1, 2)/255
def soft(x): return interpolate(x, 31, mode='bilinear')


@pytest.mark.parametrize('look', [lambda px: px, pale, lambda px: (px*.3).astype(np.uint8)], ids=['photographs', 'pale', 'dark'])
def test_the_certain_finding_leads(look):
    "One set is interpolated and only shows that something is wrong; the other shows what"
    x = chw(look(tiles()))
    E = expected_stats('resnet18')
    def twice(y): return norm(norm(y, *E), *E)
    r = DataLoaders(loader(twice(soft(x))), loader(twice(x))).stats_match('resnet18', warn=False)
    assert [f.kind for f in r.findings if f.severity != 'note'] == ['normalized_twice'], r
    assert not r.findings[0].sets


def test_sets_that_know_themselves_borrow_nothing():
    x = chw(pale(tiles()))
    r = DataLoaders(loader(norm(x, *imagenet_stats)), loader(x)).stats_match('resnet18', warn=False)
    assert r.kind == 'split_mismatch' and len([f for f in r.findings if f.severity != 'note']) == 1


@pytest.mark.parametrize('train,valid', [([IntToFloatTensor(div=1)], [IntToFloatTensor(div=1)]), ([IntToFloatTensor(div=1), *aug_transforms()], [IntToFloatTensor(div=1)])], ids=['plain', 'augmented'])
def test_the_same_fault_in_both_sets_is_one(train, valid):
    dls = loaders(*train, Normalize.from_stats(*imagenet_stats))
    r = dls.stats_match('resnet18', warn=False)
    faults = [f for f in r.findings if f.severity != 'note']
    assert [f.kind for f in faults] == ['wrong_range'] and faults[0].code == "dls.normalize_for('resnet18', div=255)"
    r.fix()
    assert dls.stats_match('resnet18').ok


def test_values_cut_off_in_negatives():
    "Colour augmentation after `Normalize`: most values end at exactly 0 or 1, however they are shared out"
    E = expected_stats('vit_base_patch32_clip_224.openai')
    x = torch.stack([(norm(o, *E)*f).clamp(0, 1) for o, f in zip(chw(255-tiles()), np.linspace(.8, 1.2, 64).astype(np.float32))])
    r = stats_match(loader(x), E, warn=False)
    assert r.kind == 'wrong_range' and 'cut off at 0 and 1' in r.findings[0].message and 'augmentation' in r.findings[0].fix


@pytest.mark.parametrize('share,outcome', [(.03, 'cannot tell'), (.08, 'mismatch')])
def test_values_beyond_black_and_white(share, outcome):
    "A few per cent may be overshoot or noise; more cannot be pixels in [0,1]"
    x = norm(soft(chw(pale(tiles()))), *imagenet_stats)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < share] = 4.
    r = stats_match(loader(x), 'resnet18', warn=False)
    assert r.outcome == outcome, r
    if outcome == 'mismatch': assert 'The values do not fit' in r.findings[0].message and r.findings[0].severity == 'warning'


@pytest.mark.parametrize('bluer,noted', [(.01, False), (.04, True)])
def test_a_little_blue_is_no_note(bluer, noted):
    "Every image is a little bluer than red, which many images make significant"
    grey = tiles().mean(-1, keepdims=True).repeat(3, -1)*.8+20
    rng = np.random.default_rng(0)
    shift = (bluer+rng.normal(0, bluer/4, (64, 1, 1)))*255/2
    grey[..., 0] -= shift
    grey[..., 2] += shift
    r = stats_match(loader(norm(chw(grey.clip(0, 255).round().astype(np.uint8)), *H)), half, warn=False)
    assert r.ok and ('channel_order' in [f.kind for f in r.findings]) == noted, r


def test_a_mean_that_is_open_by_one_level():
    "254 levels leave open which is black; with a small std a level is much, and the expected mean is among those possible"
    x = chw(np.random.default_rng(0).integers(1, 256, (64, 32, 32, 3), dtype=np.uint8))
    assert stats_match(loader(norm(x, (.5,)*3, (.02,)*3)), ((.5,)*3, (.02,)*3)).ok


def test_sixteen_odd_levels_are_no_half_of_a_lattice():
    "Digits have 16 levels, all of them odd, and black at exactly 0: not normalized, not cut off"
    from sklearn.datasets import load_digits
    px = (load_digits().images[:64]*15.9375).astype(np.uint8).repeat(4, 1).repeat(4, 2)[..., None].repeat(3, -1)
    r = stats_match(loader(chw(px)), 'resnet18', warn=False)
    assert r.kind == 'not_normalized', r


@pytest.mark.parametrize('top,div', [(1, 1), (255, 255)])
def test_a_dataset_of_floats(top, div):
    "In [0,1], and divided by 255 again; or in 0-255, and not divided"
    px = torch.tensor(tiles()).permute(0, 3, 1, 2)/255*top
    dls = Datasets(range(64), [[lambda i: TensorImage(px[i])], [lambda i: i % 2]]).dataloaders(bs=16, num_workers=0, after_batch=[IntToFloatTensor(div=255 if top == 1 else 1),
                                                                                                                           Normalize.from_stats(*imagenet_stats)])
    r = dls.stats_match('resnet18', warn=False)
    assert r.kind == 'wrong_range' and r.findings[0].code == f"dls.normalize_for('resnet18', div={div})"
    exec(r.findings[0].code, dict(dls=dls))
    assert dls.stats_match('resnet18').ok


@pytest.mark.parametrize('scale,kind', [(30, 'wrong_range'), (2, 'wrong_stats')])
def test_values_of_another_size_altogether(scale, kind):
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))*scale
    f, = [f for f in stats_match(loader(x), 'resnet18', warn=False).findings if f.severity != 'note']
    assert (f.kind, f.severity) == (kind, 'warning')


def test_blue_files_are_read_as_rgb(tmp_path):
    "Pillow opened them, so their order is known, and being blue is a matter of what they show"
    from PIL import Image
    blue = tiles().copy()
    blue[..., 0] //= 3
    for i, im in enumerate(blue): Image.fromarray(im).save(tmp_path/f'{i}.png')
    r = stats_match(tmp_path, 'resnet18')
    assert r.ok and r.kind == 'domain_shift' and 'read as RGB' in r.findings[0].message, r


def test_a_set_that_contradicts_borrows_nothing():
    "Nothing is certain about floats in 0-255 but that they were not treated like the other set"
    x = chw(tiles())
    r = DataLoaders(loader(norm(x, *imagenet_stats)), loader(255*soft(x)+7)).stats_match('resnet18', warn=False)
    assert r.outcome == 'mismatch' and r.findings[0].sets == ('validation set',), r


def test_what_is_stated_leads_before_what_a_lattice_allows():
    "DPN's means lie whole levels apart, so pale images with its constants in reverse could be right ones; the pipeline says which"
    E = expected_stats('dpn68')
    dls = loaders(Normalize.from_stats(E.mean[::-1], E.std[::-1]), px=pale(tiles()))
    assert dls.stats_match('dpn68', warn=False).kind == 'channel_order'
