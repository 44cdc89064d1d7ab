"`infer_normalization` on real images under every known normalization, and on what could mislead it."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from fastai_normx.constants import families, plain
from fastai_normx.infer import InferredStats, _families, _variants, infer_normalization

vec = lambda v, dt=torch.float64: torch.tensor(v, dtype=dt).view(1, -1, 1, 1)


def norm(x, mean, std, dt=torch.float32): return (x.to(dt) - vec(mean, dt))/vec(std, dt)


def close(r, mean, std, rel=1e-3):
    "Are all constants right? A mean near 0 counts on the scale of its std"
    return all(abs(a-b) <= rel*max(abs(b), s) and abs(t-s) <= rel*s for a, b, t, s in zip(r.mean, mean, r.std, std))


def right(x, mean, std, rel=1e-4, least=.9):
    r = infer_normalization(x)
    assert r is not None and close(r, mean, std, rel) and r.confidence >= least and all(r.determined), r
    for m, (lo, hi) in zip(mean, r.mean_range): assert lo-1e-3*max(1, abs(lo)) <= m <= hi+1e-3*max(1, abs(hi)), r
    return r


def unsure(x, most=.8):
    r = infer_normalization(x)
    assert r is None or r.confidence < most and not all(r.determined), r
    return r


def photos():
    from skimage import data
    from sklearn.datasets import load_sample_images
    ims = [data.astronaut(), data.coffee(), data.chelsea(), *load_sample_images().images]
    return torch.stack([torch.tensor(im[40:264, 60:284]).permute(2, 0, 1) for im in ims])


def faces():
    from skimage import data
    return torch.tensor((data.lfw_subset()*255).round()).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)


def grey():
    from skimage import data
    return torch.stack([torch.tensor(getattr(data, n)()[:200, :200]) for n in ('camera', 'brick', 'grass', 'gravel', 'coins')])[:, None].expand(-1, 3, -1, -1)


def digits():
    "17 levels of grey, 0 to 255 as Pillow would save them"
    from sklearn.datasets import load_digits
    return torch.tensor((load_digits().images*255/16).round()).to(torch.uint8)[:256, None].expand(-1, 3, -1, -1)


known = {'pixels in [0,1]': plain, **families}
sets = {f.__name__: f() for f in (photos, faces, grey, digits)}
X = sets['photos']
imagenet = tuple(known['ImageNet'])
XN = norm(X/255, *imagenet)


@pytest.mark.parametrize('images', sets)
@pytest.mark.parametrize('name', _variants())
def test_every_variant_on_every_set(images, name):
    "The six families as they are, on both wrong scales, and any two in a row, the way a pipeline would do it: in steps, in float32"
    x, first, _, then = sets[images], *name.partition(', then ')
    if ', divided by 255 twice' in name: y, first = x/255/255, name.partition(',')[0]
    elif 'pixels in 0-255' in name: y, first = x.float(), name.partition(',')[0]
    else: y = x/255
    if first in known: y = norm(y, *known[first])
    if then: y = norm(y, *known[then])
    if images == 'digits' and 'twice' in name and infer_normalization(y) is None: return  # 17 levels, and steps of a few hundred floats
    assert right(y, *_variants()[name]).source == name


def test_single_photos_crops_and_flips():
    for x in XN:
        for y in (x[None], x[None, :, :8, :8], x[None, :, 50:90, 30:70].flip(-1)): assert right(y, *imagenet).source == 'ImageNet'


@pytest.mark.parametrize('dt', [torch.float16, torch.bfloat16])
def test_half_precision_is_right_or_unsure(dt):
    n = 0
    for m, s in _variants().values():
        for y in (norm(X.double()/255, m, s, torch.float64).to(dt), norm(X.to(dt)/255, m, s, dt)):
            for z in (y, y.float()):
                r = infer_normalization(z)
                if r is not None and r.confidence >= .8: n += 1; assert close(r, m, s)
    assert n > (100 if dt == torch.float16 else 20), n


def test_float64_and_other_integers():
    right(norm(X.double()/255, *imagenet, torch.float64), *imagenet, rel=1e-6)
    r = right(X, (0,)*3, (1/255,)*3)
    assert r.confidence == 1
    assert right(X.long(), (0,)*3, (1/255,)*3).source == right(X.int(), (0,)*3, (1/255,)*3).source == 'pixels in 0-255'


def test_axes():
    want = imagenet
    assert close(infer_normalization(XN.permute(0, 2, 3, 1), dim=-1), *want)
    assert close(infer_normalization(XN[0], dim=0), *want)
    assert close(infer_normalization(XN.flatten(2)), *want)
    video = XN[None].expand(2, -1, -1, -1, -1)
    assert close(infer_normalization(video, dim=2), *want) and close(infer_normalization(video.transpose(1, 2)), *want)
    assert close(infer_normalization(XN.contiguous(memory_format=torch.channels_last)), *want)
    assert close(infer_normalization(XN.numpy()), *want) and close(infer_normalization(XN.clone().requires_grad_()), *want)
    with pytest.raises(ValueError, match=r'3 to 5 axes, received shape \(5, 3\)'): infer_normalization(XN[:, :, 0, 0])


def test_tensor_image():
    from fastai.torch_core import TensorImage
    assert close(infer_normalization(TensorImage(XN)), *imagenet)


def test_deterministic_and_unchanged():
    before = XN.clone()
    assert infer_normalization(XN) == infer_normalization(XN)
    assert torch.equal(before, XN)


def test_nothing_to_read():
    for y in (torch.zeros(0, 3, 8, 8), torch.zeros(4, 3, 0, 8), torch.zeros(4, 0, 8, 8), torch.zeros(4, 3, 8, 8), torch.full((2, 3, 8, 8), math.nan), torch.full((2, 3, 8, 8), math.inf)):
        assert infer_normalization(y) is None
    g = torch.Generator().manual_seed(0)
    for dt in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for f in (torch.randn, torch.rand): unsure(f(8, 3, 32, 32, generator=g).to(dt), .3)
        unsure((torch.rand(8, 3, 32, 32, generator=g)*.1+1).to(dt), .3)


def test_interpolation():
    theta = torch.tensor([[.96, -.28, 0.], [.28, .96, 0.]])[None].expand(len(XN), -1, -1)
    ys = [F.interpolate(XN, size=s, mode=m, antialias=a) for s in (112, 160, 200, 256, 448) for m in ('bilinear', 'bicubic') for a in (False, True)]
    ys += [F.avg_pool2d(XN, 2), F.avg_pool2d(XN, 3), F.grid_sample(XN, F.affine_grid(theta, XN.shape, align_corners=False), align_corners=False)]
    for y in ys:
        for z in (y, y.half(), y.bfloat16(), y[:1], y[:, :, :16, :16]): unsure(z, .5)


def test_brightness_and_mixup():
    g = torch.Generator().manual_seed(1)
    scale, lam = torch.rand(5, 1, 1, 1, generator=g)*.4+.8, torch.rand(5, 1, 1, 1, generator=g)
    x = X/255
    for y in (x*scale, (x*scale).clamp(0, 1), torch.logit(x.clamp(1e-3, 1-1e-3)).add(.3).sigmoid(), x**1.2, lam*x+(1-lam)*x.flip(0)): unsure(norm(y, *imagenet), .5)
    r = infer_normalization(norm(x*.8, *imagenet))  # the same change for all is a straight line, as other constants are: never sure
    assert r.confidence < .9 and r.source == 'no known constants'
    unsure(norm(x[:1]*.8+.05, *imagenet))


def test_mixtures():
    soft = F.interpolate(F.interpolate(XN, size=160, mode='bilinear'), size=224, mode='bilinear')
    half, border, rows = XN.clone(), F.pad(XN, (30, 30, 10, 10)), XN.clone()
    half[:2] = soft[:2]; rows[:, :, :90] = soft[:, :, :90]
    erased = XN.clone(); erased[:, :, 60:150, 30:120] = torch.randn(5, 3, 90, 90)
    for y in (half, border, rows, erased): assert right(y, *imagenet).source == 'ImageNet'
    unsure(torch.cat([XN, norm(X/255, *known['CLIP'])]), .5)
    unsure(torch.cat([XN, X/255]), .5)


def test_zeros_of_padding_are_no_levels():
    "Between the levels of 0.3/0.5 a zero halves the steps, and then up to level 204 they look like pixels in [0,1]"
    y = norm(X.clamp(80, 204)/255, (.3,)*3, (.5,)*3)
    for z in (y, F.pad(y, (9, 9))): unsure(z)


def test_steps_of_the_number_format():
    "All bfloat16 from 128 to 255 are whole numbers, whatever was rounded"
    x = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(4))*127+128
    for y in (x.bfloat16(), x.bfloat16().float()): assert infer_normalization(y) is None


def test_non_finite():
    y = XN.clone()
    y[0, 0, 0, 0], y[1, :, 3], y[2, :, 5] = math.nan, math.inf, -math.inf
    right(y, *imagenet)
    y[:, 1] = math.nan
    r = unsure(y)
    assert math.isnan(r.mean[1]) and r.determined == (True, False, True) and r.confidence == r.confidences[1] == 0


def test_constant_channel():
    x = X.clone(); x[:, 2] = 128
    r = right(norm(x/255, *imagenet), *imagenet)
    assert r.confidence == .9
    r = unsure(norm(x/255, (.2, .3, .4123), (.2, .3, .4)))
    assert math.isnan(r.std[2]) and close(InferredStats(r.mean[:2], r.std[:2], *[None]*6), (.2, .3), (.2, .3))


def test_own_constants_are_read_but_never_sure():
    m, s = (.31234, .4, .123), (.31, .17, .22)
    r = infer_normalization(norm(X/255, m, s))
    assert close(r, m, s, 1e-4) or r.confidence < .8
    b = X.clone(); b[:, :, 0, 0], b[:, :, 0, 1] = 0, 255
    r = infer_normalization(norm(b/255, m, s))
    assert close(r, m, s, 1e-4) and r.confidence == .85 and all(r.determined) and r.source == 'no known constants'
    assert infer_normalization(norm(b[:1]/255, m, s)).confidence < .8


def test_never_black_or_white():
    x = X.clamp(20, 230)
    right(norm(x/255, *imagenet), *imagenet)
    r = unsure(norm(x/255, (.5,)*3, (.5,)*3))
    assert r.source == '0.5/0.5' and close(r, (.5,)*3, (.5,)*3)
    lo, hi = r.mean_range[0]
    assert lo == pytest.approx(.5-20/255, abs=1e-4) and hi == pytest.approx(.5+25/255, abs=1e-4)
    # 0.3/0.5 up to level 204 is 0.5/0.5, too: the data cannot tell
    unsure(norm(X.clamp(10, 200)/255, (.3,)*3, (.5,)*3))


@pytest.mark.parametrize('levels', [(0, 255), (0, 16, 32), (10, 11), (3, 90, 91, 200), tuple(range(0, 256, 17)), (8, 16, 24, 32, 40, 48, 56, 64)])
def test_few_colours(levels):
    g = torch.Generator().manual_seed(2)
    x = torch.tensor(levels)[torch.randint(len(levels), (4, 3, 16, 16), generator=g)]
    for m, s in known.values():
        r = infer_normalization(norm(x/255, m, s))
        assert r is None or close(r, m, s) or r.confidence < .8, (r, m, s)
    if levels == (0, 255): assert infer_normalization(norm(x/255, *imagenet)).confidence < .5  # 0 and 1 on pixels in 0-255 look the same
    else: right(norm(x/255, *imagenet), *imagenet)


def test_digits_in_steps_of_15_and_16():
    from sklearn.datasets import load_digits
    d = torch.tensor(load_digits().images[:64])[:, None].expand(-1, 3, -1, -1)
    right(norm(d*15/255, *imagenet), *imagenet)
    unsure(norm(d*15/255, (.5,)*3, (.5,)*3))
    for y in (norm(d/16, *imagenet), d/16, norm(d/16, (.5,)*3, (.5,)*3), norm(d/16, (.1307,)*3, (.3081,)*3)): unsure(y)


def test_16_bits():
    g = torch.Generator().manual_seed(3)
    for top in (1024, 4096, 65536):
        x = torch.randint(top, (8, 3, 64, 64), generator=g)/(top-1)
        unsure(x); unsure(norm(x, *imagenet)); unsure(x.double())
    right(norm((X.long()*257)/65535, *imagenet), *imagenet)  # 8 bits in a 16-bit file


@pytest.mark.parametrize('n', [1, 2, 4, 6])
def test_other_numbers_of_channels(n):
    m, s = [[o[c % 3] for c in range(n)] for o in imagenet]
    x = torch.cat([X, X.flip(0)], 1)[:, :n]
    right(norm(x/255, m, s), m, s)


def test_rgb_and_one_more():
    depth = X[:, :1].clone(); depth[:, :, 0, 0], depth[:, :, 0, 1] = 0, 255
    m, s = (*imagenet[0], .31234), (*imagenet[1], .27)
    r = infer_normalization(norm(torch.cat([X, depth], 1)/255, m, s))
    assert close(r, m, s, 1e-4) and r.confidences[:3] > (.98,)*3 and r.confidence == .85 and r.source == 'ImageNet; no known constants'
    r = infer_normalization(torch.cat([XN, torch.rand(5, 1, 224, 224)], 1))
    assert r.determined == (True, True, True, False) and math.isnan(r.mean[3])


def test_grey_constants_for_one_channel():
    m, s = [[sum(w*v for w, v in zip((.299, .587, .114), o))] for o in imagenet]
    assert right(norm(X[:, :1]/255, m, s), m, s).source == 'ImageNet (grey)'
    assert right(norm(X[:, :1]/255, [.5], [.5]), [.5], [.5]).source == '0.5/0.5'


def test_known_constants_are_what_timm_uses():
    import timm
    have = {(tuple(round(v, 9) for v in m), tuple(round(v, 9) for v in s)) for m, s in known.values()}
    for n in timm.list_models(pretrained=True):
        c = timm.get_pretrained_cfg(n)
        assert (tuple(round(v, 9) for v in c.mean), tuple(round(v, 9) for v in c.std)) in have, n


constants = st.one_of(
    st.sampled_from(list(_families(3))).map(lambda o: tuple(zip(*o))),
    st.lists(st.tuples(st.floats(-1, 2), st.floats(.01, 3)), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 20).map(lambda i: i/20), st.integers(1, 20).map(lambda i: i/20)), min_size=3, max_size=3),
    st.tuples(st.integers(0, 10).map(lambda i: i/10), st.sampled_from([.1, .2, .25, .5, 1, 2, 1/255, 2/255, 255.])).map(lambda o: [o]*3))
palettes = st.builds(lambda start, step, size, pick: np.arange(start, 256, step)[:size][pick % 2::1+(pick > 8)], st.integers(0, 200) | st.just(0),
                     st.sampled_from([1, 1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 51]), st.integers(2, 256) | st.just(256), st.integers(0, 10)).filter(len)
changes = ['none']*4 + ['zero border', 'half resized', 'resized', 'nan', 'noise patch', 'through bfloat16', 'through float16']


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(constants, st.lists(palettes, min_size=3, max_size=3), st.sampled_from([1, 3, 3, 3]), st.sampled_from([torch.float32]*4+[torch.float64, torch.float16, torch.bfloat16]),
       st.sampled_from(changes), st.booleans(), st.integers(1, 4), st.sampled_from([4, 16, 40]), st.integers(0, 2**32-1))
def test_never_confidently_wrong(consts, pals, n, dt, change, smooth, n_images, size, seed):
    rng, (mean, std) = np.random.default_rng(seed), zip(*consts[:n])
    shape = n_images, size, size
    walk = [np.cumsum(rng.normal(size=shape), -1) if smooth else rng.random(shape) for _ in range(n)]
    x = np.stack([p[((w-w.min())/(np.ptp(w)+1e-9)*len(p)).astype(int)] for p, w in zip(pals, walk)], 1)
    y = norm(torch.tensor(x).to(dt)/255, mean, std, dt)
    if change == 'zero border': y[..., :2] = 0
    if change == 'nan': y[0, 0, 0, 0] = math.nan
    if change == 'noise patch': y[..., :size//2, :2] = torch.tensor(rng.normal(size=(size//2, 2)))
    if 'resized' in change: z = F.interpolate(F.interpolate(y.float(), size=size-1, mode='bilinear'), size=size, mode='bilinear').to(dt)
    if change == 'resized': y = z
    if change == 'half resized': y[:n_images//2+1] = z[:n_images//2+1]
    if 'through' in change: y = y.to(getattr(torch, change.split()[1])).float()
    r = infer_normalization(y)
    if r is None: return
    assert 0 <= r.confidence <= 1 and r.confidence == min(r.confidences) and len(r.mean) == n
    assert r.confidence < .9 or close(r, mean, std), (r, mean, std)
