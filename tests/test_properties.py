"""Arithmetic of `ChannelStats` on whatever numbers there are; fractions, which never round, are the judge.

A few hundred draws run here; 10,000 of each with `pytest --runslow -m slow`, or `RUNSLOW=1 pytest`."""
import functools, json, math, random, warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as hn

from fastai_normx.stats import ChannelStats

fields = 'mean std within_std sem std_sem min max count nonfinite'.split()
top = Fraction(np.finfo(float).max)


def root(q):
    "The square root of a fraction as a float; inf if it has none"
    n, d = q.as_integer_ratio()
    shift = max(0, 300-n.bit_length()+d.bit_length())//2*2
    r = Fraction(math.isqrt((n << shift)//d), 1 << shift//2)
    return float(r) if r <= top else math.inf


def exact(images):
    "Every field by its definition, from a list of lists of numbers; None where no number is finite"
    found = [[Fraction(v) for v in im if math.isfinite(v)] for im in images]
    bad = sum(map(len, images))-sum(map(len, found))
    ps = [p for p in found if p]
    k, n = len(ps), sum(map(len, ps))
    if not n: return None
    mean = sum(map(sum, ps))/n
    var = sum((v-mean)**2 for p in ps for v in p)/n
    within = [sum((v-sum(p)/len(p))**2 for v in p)/len(p) for p in ps]
    def error(e): return root(sum(q*q for q in e)*k/(k-1)/n**2) if k > 1 else math.inf
    by_std = [sum((v-mean)**2-var for v in p) for p in ps]
    std_sem = root(Fraction(sum(q*q for q in by_std)*k, (k-1)*n*n*4)/var) if k > 1 and var else error([0]*k)
    return dict(mean=float(mean), std=root(var), within_std=sum(map(root, within))/k, sem=error([sum(v-mean for v in p) for p in ps]),
        std_sem=std_sem,
                min=float(min(map(min, ps))), max=float(max(map(max, ps))), count=n, nonfinite=bad)


def size(images): return max((abs(float(v)) for im in images for v in im if math.isfinite(v)), default=0.)


def check(s, images, rtol=1e-9, at=1e-13):
    "Are the fields of the one channel of `s` those of `images`, with inf where squares may overflow?"
    want, scale = exact(images), size(images)
    assert len(s) == len(images)
    if want is None:
        assert s.count.tolist() == [0] and s.mean.isnan().all() and s.sem.isinf().all()
        return
    for f in fields:
        got = getattr(s, f).item()
        if got == want[f]: continue
        if f in ('min', 'max') and abs(got-want[f]) <= 2**-51*abs(want[f]): continue  # integers beyond 2**53 are no floats
        assert f not in ('min', 'max', 'count', 'nonfinite') and not math.isnan(got), (f, got, want[f])
        if math.isinf(got):  # fourth powers are summed for the error of the standard deviation
            assert f != 'mean' and scale > (1e75 if f == 'std_sem' else 1e150), (f, got, want[f])
            continue
        far = 2e-7 if f == 'std_sem' else at  # a root of a difference
        # below 1e-154 squares are 0
        assert abs(got-want[f]) <= rtol*abs(want[f])+far*scale+(1e-75 if f == 'std_sem' else 1e-150), (f, got, want[f])


def in_any_order(rng, parts):
    "The sum of `parts`, grouped and ordered at random"
    parts = list(parts)
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        parts.append(a+b)
    return parts[0]


def spread(rng):
    "Images of one channel, of numbers of any magnitude, far from 0 or near, some of them no numbers"
    n, p = rng.randint(1, 5), rng.randint(1, 6)
    e = rng.choice([0, 0, 0, -320, -300, -160, 70, 100, 140, 150, 154, 200, 300, 308])
    base = rng.choice([0, 0, 1, 1e6, 1e9, -1e12])*10.**min(e, 290)*rng.choice([0, 1])
    def value(): return base+rng.choice([rng.gauss(0, 1), rng.gauss(0, 1), 0, 1])*10.**e if e < 300 else rng.uniform(-1, 1)*10.**e
    x = [[value() for _ in range(p)] for _ in range(n)]
    if rng.random() < .3: x = [[v*10.**rng.uniform(-100, 0) for v in im] for im in x]
    for _ in range(rng.choice([0, 0, 0, 1, n*p])): x[rng.randrange(n)][rng.randrange(p)] = rng.choice([math.nan, math.inf, -math.inf])
    if rng.random() < .2: x[rng.randrange(n)] = list(x[0])
    return x


def of_one_channel(x): return ChannelStats.of(np.array(x, dtype=np.float64)[:, None])


def any_magnitude(seed):
    rng = random.Random(seed)
    x = spread(rng)
    a = np.array(x)[:, None]
    merged = in_any_order(rng, [of_one_channel([im]) for im in x])
    for s in (of_one_channel(x), merged, ChannelStats.of(a[::-1, :, ::-1]), ChannelStats.from_json(merged.to_json()),
        sum([of_one_channel([im]) for im in x])): check(s, x)
    for s in (merged.affine(1e200, 1e-200), merged.affine(-3, 1e200), merged.inverse(.5, .25)):
        for f in ('std', 'within_std', 'sem', 'std_sem'): assert merged.count.item() == 0 or not getattr(s, f).isnan().any(), f


@pytest.mark.parametrize('seeds', [range(300), pytest.param(range(300, 10000), marks=pytest.mark.slow)], ids=str)
def test_any_magnitude_in_any_order_and_grouping(seeds):
    for seed in seeds: any_magnitude(seed)


numbers = st.floats() | st.sampled_from([0., -0., 1., 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf])
lists = st.lists(st.lists(numbers, min_size=1, max_size=5), min_size=1, max_size=5)


def any_floats(images, rng):
    images = [im[:min(map(len, images))] for im in images]
    check(of_one_channel(images), images)
    check(in_any_order(rng, [of_one_channel([im]) for im in images]), images)


calm = functools.partial(settings, deadline=None, suppress_health_check=list(HealthCheck))
test_any_floats = calm(max_examples=200)(given(lists, st.randoms(use_true_random=False))(any_floats))
test_many_floats = pytest.mark.slow(calm(max_examples=10000)(given(lists, st.randoms(use_true_random=False))(any_floats)))


kinds = [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32, np.float64,
    np.longdouble, '>f4', '>i2']
shapes = hn.array_shapes(min_dims=2, max_dims=5, min_side=0, max_side=4)


def layout(rng, x):
    "`x` in another layout: the same numbers at other places of memory"
    how = rng.choice(['plain', 'backwards', 'axes', 'steps', 'fortran', 'frozen', 'tensor', 'channels last', 'subclass'])
    if how == 'backwards': return x[tuple(slice(None, None, -1) for _ in x.shape)].copy()[tuple(slice(None, None, -1) for _ in x.shape)]
    if how == 'axes': return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0)
    if how == 'steps': return np.repeat(x, 2, axis=-1)[..., ::2]
    if how == 'fortran': return np.asfortranarray(x)
    if how == 'frozen':
        x = x.copy()
        x.flags.writeable = False
    if how in ('tensor', 'channels last') and x.dtype.isnative and x.dtype != np.longdouble:
        t = torch.from_numpy(x.copy())
        return t.contiguous(memory_format=torch.channels_last) if how == 'channels last' and t.ndim == 4 else t
    return x.view(np.memmap) if how == 'subclass' else x


def any_array(data, rng):
    dtype = np.dtype(data.draw(st.sampled_from(kinds)))
    shape = data.draw(shapes)
    if dtype.kind == 'f': x = data.draw(hn.arrays(np.float64, shape, elements=st.floats(-1e4, 1e4,
        width=16) | st.sampled_from([math.nan, math.inf]))).astype(dtype)
    else: x = data.draw(hn.arrays(dtype, shape))
    dim = rng.randrange(1, x.ndim)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = ChannelStats.of(layout(rng, x), dim=dim-x.ndim*rng.choice([0, 1]))
    images = np.moveaxis(x, dim, 1)
    images = images.reshape(*images.shape[:2], math.prod(images.shape[2:]))
    assert len(s) == len(x) and len(s.mean) == x.shape[dim]
    for c in range(x.shape[dim]):
        plain = [[float(v) if dtype.kind == 'f' else int(v)/Fraction(255) for v in im[c]] for im in images]
        one = ChannelStats(len(s), {k: v[c:c+1] for k, v in s._s.items()})
        narrow = dtype.kind == 'f' and dtype.itemsize < 8  # summed in float32, 256 at a time
        check(one, plain, *(1e-6, 1e-6) if narrow else (1e-9, 1e-13))


test_any_array = calm(max_examples=200)(given(st.data(), st.randoms(use_true_random=False))(any_array))
test_many_arrays = pytest.mark.slow(calm(max_examples=10000)(given(st.data(), st.randoms(use_true_random=False))(any_array)))


@given(st.floats(-1e12, 1e12), st.floats(1e-3, 1), st.integers(2, 200), st.integers(0, 10**6))
@calm(max_examples=50)
def test_huge_means_with_a_tiny_variance(mean, std, n, seed):
    rng = random.Random(seed)
    x = [[mean+rng.gauss(0, std) for _ in range(5)] for _ in range(n)]
    want = exact(x)
    for s in (of_one_channel(x), in_any_order(rng, [of_one_channel(x[i:i+7]) for i in range(0, n, 7)])):
        rounding = 2**-50*(abs(mean)+std)  # of the mean, which is a float
        assert abs(s.mean.item()-want['mean']) <= rounding and abs(s.std.item()-want['std']) <= 1e-9*want['std']+rounding


def test_a_thousand_million_images():
    "Twice as many 30 times: the statistics of one batch, and an error that falls with the root of the number"
    x = np.random.default_rng(0).random((3, 2, 4, 4))
    one = s = ChannelStats.of(x)
    for _ in range(30): s = s+s
    n = 2**30
    assert len(s) == 3*n and s.count.tolist() == [48*n]*2
    for f in ('mean', 'std', 'within_std', 'min', 'max'): np.testing.assert_allclose(getattr(s, f), getattr(one, f), rtol=1e-12)
    for f in ('sem', 'std_sem'): np.testing.assert_allclose(getattr(s, f)*math.sqrt((3*n-1)/2), getattr(one, f), rtol=1e-12)
    more = s+ChannelStats.of(x[:1]+1)  # one image more still counts
    assert len(more) == 3*n+1 and more.count.tolist() == [48*n+16]*2 and (more.mean > s.mean).all() and (more.max > 1).all()
    assert ChannelStats.from_json(more.to_json()) == more


def test_opposite_numbers_at_the_end_of_the_range():
    a, b = ChannelStats.of(np.full((1, 1, 2), 1.7e308)), ChannelStats.of(np.full((3, 1, 2), -1.7e308))
    for s in (a+b, b+a, sum([a, b]),
        a+ChannelStats()+b): assert s.mean.item() == pytest.approx(-.85e308) and s.std.item() == math.inf and s.sem.item() == math.inf
    assert (a+b).min.item() == -1.7e308 and not (a+b).margin().isnan().any()


def test_an_overflow_of_fourth_powers_does_not_reach_the_error_of_the_mean():
    x = np.random.default_rng(0).normal(size=(6, 1, 4))*1e100
    whole, parts = ChannelStats.of(x), sum([ChannelStats.of(x[i:i+2]) for i in (0, 2, 4)])
    assert parts.sem.item() == pytest.approx(whole.sem.item(), rel=1e-12) and whole.sem.item() < 1e101 and parts.std_sem.item() == math.inf


float8 = [t for k in ('float8_e4m3fn', 'float8_e5m2') if (t := getattr(torch, k, None))]


def test_tensors_that_numpy_does_not_know():
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for t in (torch.bfloat16, *float8):
        got, want = ChannelStats.of(x.to(t)), ChannelStats.of(x.to(t).double())
        for f in fields: np.testing.assert_allclose(getattr(got, f), getattr(want, f), rtol=1e-4, err_msg=f)
    assert ChannelStats.of(torch._neg_view(x)).mean.tolist() == ChannelStats.of(-x).mean.tolist()
    assert ChannelStats.of((x+1j*x).conj().imag) == ChannelStats.of(-x)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make,msg', [
    (lambda x: x.to_sparse(), 'to_dense'), (lambda x: x[0, 0].to_sparse_csr(), 'to_dense'),
    (lambda x: x.to('meta'), 'received a tensor without data'), (lambda x: torch.nested.nested_tensor([x[0], x[0, :, :2]]),
    'to_padded_tensor'),
    (lambda x: torch.quantize_per_tensor(x, .1, 0, torch.quint8), 'dequantize'), (lambda x: np.ma.masked_less(x.numpy(), .5),
    r'filled\(np.nan\)'), (lambda x: x.numpy().astype(object), 'received object'),
    (lambda x: x.numpy().astype(str), 'received <U'), (lambda x: np.zeros((2, 3), 'M8[s]'), 'received datetime64'),
    (lambda x: x > .5, 'received torch.bool'), (lambda x: x+1j, 'received torch.complex64'), (lambda x: x.tolist(), 'received list'),
    (lambda x: None, 'received NoneType'),
])
def test_what_are_no_pixels(make, msg):
    with pytest.raises(ValueError, match=f'ChannelStats.of takes .*{msg}'): ChannelStats.of(make(torch.rand(2, 3, 4, 5)))


good = ChannelStats.of(np.random.default_rng(0).random((2, 3, 4))).to_dict()


@pytest.mark.parametrize('d', [{}, [], None, 3, 'text', dict(items=3), *[good | {k: v} for k,
    v in dict(items='a', mean='a', gram=[1], pixels=None, min=[[1]]*3, dev=[1], within=[{}]*3, max=3, images=[1, 2, 10**400]).items()],
    good | dict(items=-1), good | dict(items=True), good | dict(items=2.5), good | dict(mean=[])], ids=lambda d: str(d)[:40])
def test_what_to_dict_did_not_write(d):
    with pytest.raises(ValueError, match='from_dict takes what `ChannelStats.to_dict` wrote'): ChannelStats.from_dict(d)
    with pytest.raises(ValueError, match='from_dict takes what `ChannelStats.to_dict` wrote'): ChannelStats.from_json(json.dumps(d))


@pytest.mark.parametrize('text', ['', '{', 'no json', '['*99999, b'\xff', None, 3])
def test_what_to_json_did_not_write(text):
    with pytest.raises(ValueError, match='from_json takes what `ChannelStats.to_json` wrote'): ChannelStats.from_json(text)
