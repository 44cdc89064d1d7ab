"""How well `harm`, the estimate from the constants alone, follows the loss that was measured.

    python benchmarks/severity.py --data FOLDER                  # measures 45 pipelines on four backbones: an hour on one core
    python benchmarks/severity.py --data FOLDER --backbone vit   # one of them; what is saved already is not repeated
    python benchmarks/severity.py                                # the estimate against the saved measurements
    python benchmarks/severity.py --fit                          # and the constants of the estimate, fitted to them

FOLDER and the packages that bring the weights: see normalization_matters.py and backbones.py. Nothing is trained: a pretrained model
is used as it is, with frozen statistics, on pixels that were normalized with other constants. `loss` is the share of the right answers
that is lost. EfficientNet-Lite0 to 2 name the class of ImageNet photographs. The ViT has no classifier: it finds another crop of
the same photograph among all, those normalized as expected. `changed` is the share of answers that differ from the expected pipeline's.

Held out: every pipeline is estimated with constants fitted without it, on the other half of the pipelines; those of a Lite model on
the other two models.
"""
import argparse, json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from backbones import BACKBONES
from normalization_matters import dumps, imagenet, listed, machine, norm, own, rounded
from retrieval import corners, features, nearest
from fastai_normx.constants import Affine, families, plain
from fastai_normx.expected import expected_stats
from fastai_normx.harm import Measured, _faults, harm, measured_on

RESULTS = Path(__file__).parent/'results/severity.json'


def mild(E, n=4):
    "`n` mistakes drawn with a fixed seed: each mean off by about a tenth of the pixels' range, each std by about a third"
    rng = np.random.default_rng(12)
    for _ in range(n):
        shift, stretch = rng.normal(0, .1, 3), np.exp(rng.normal(0, .3, 3))
        yield Affine(tuple(np.add(E.mean, shift)), tuple(np.multiply(E.std, stretch)))

def cases(
    expected, # `Affine` that the backbone expects
    data # `Affine` of the data's own mean and std
):
    "`{pipeline: Affine}`: what was done to pixels in [0,1]"
    E = Affine(*expected)
    half, inet = families['0.5/0.5'], families['ImageNet']
    other = inet if E.same(half) else half
    def shift(*d): return Affine(tuple(np.add(E.mean, d)), E.std)
    def stretch(*k): return Affine(E.mean, tuple(np.multiply(E.std, k)))
    res = {'expected': E} | {k: c for k, c in families.items() if not c.same(E) and k!='DPN'} | {"the data's own": data, 'none': plain}
    twice = {'expected twice': (E, E), 'expected, then another': (E, other), 'another, then expected': (other, E)}
    twice['another twice'] = other, other
    res |= {k: a.then(b) for k, (a, b) in twice.items()} | {'CLIP twice': families['CLIP'].then(families['CLIP'])}
    for k, c in {'expected': E, 'none': plain}.items(): res |= {f'{k} on 0-255': c.scaled(255), f'{k}, /255 twice': c.scaled(1/255)}
    res |= {"ImageNet's reversed": inet.reverse()}
    res |= {f'mean {d:+}': shift(d, d, d) for d in (-.5, -.35, -.2, .2, .35, .5)}
    res |= {f'mean 0, {d:+}, 0': shift(0, d, 0) for d in (-.4, .2, .4)}
    res |= {f'mean {-d:+}, 0, {d:+}': shift(-d, 0, d) for d in (-.4, -.2, .2, .4)}
    res |= {f'std x {k}': stretch(k, k, k) for k in (.25, .35, .5, 2, 3, 4, 6, 8, 16)}
    res |= {f'std x {a}, {b}, {c}': stretch(a, b, c) for a, b, c in ((1.5, 1, .67), (.5, 1, 2), (4, 1, .25))}
    return res | {f'mild {i}': c for i, c in enumerate(mild(E), 1)}


def measure(backbone, folder, done, save):
    "Calls `save` with what was measured after each pipeline; those in `done` are not repeated"
    model, res = backbone.load(), dict(done)
    if backbone.norm=='LayerNorm':
        gallery, x = corners([f for f, _ in listed(folder)], backbone.size)
        g, y = features(model, gallery, lambda b: norm(b, *backbone.expected)), torch.arange(len(x))
        def ask(c): return nearest(features(model, x, lambda b: norm(b, *c)), g)
    else:
        x, y = imagenet(folder, backbone)
        def ask(c): return features(model, x, lambda b: norm(b, *c)).argmax(1)
    for k, c in cases(backbone.expected, Affine(*own(x))).items():
        if k in done and k!='expected': continue
        a = ask(c)
        n = int((a==y).sum())
        if k=='expected': ref, right = a, n
        r = res[k] = dict(mean=list(c.mean), std=list(c.std), correct=n, loss=1-n/right, changed=float((a!=ref).float().mean()))
        print(f'{backbone.name:18} {k:24} top-1 {n/len(y):.3f}  loss {r["loss"]:.3f}  changed {r["changed"]:.3f}', flush=True)
        about = dict(name=backbone.name, arch=backbone.arch, norm=backbone.norm, images=len(y))
        save(dict(**about, date=str(date.today()), machine=machine(), pipelines=res))

@dataclass
class Rows:
    "Faults, by name, and losses of some pipelines"
    faults: list
    loss: np.ndarray

    @classmethod
    def of(cls, b, which=slice(None)):
        "The pipelines `which` of the saved backbone `b`"
        E, rows = expected_stats(b['arch']), list(b['pipelines'].values())[which]
        return cls([_faults(E, (r['mean'], r['std'])) for r in rows], np.array([r['loss'] for r in rows]))

    @classmethod
    def joined(cls, rows): return cls([f for r in rows for f in r.faults], np.concatenate([r.loss for r in rows]))

def fitted(rows):
    "A `Measured` whose constants follow `rows`: least squares with outliers counted less, errors in units of what 500 images can tell"
    names, y = list(rows.faults[0]), rows.loss
    x = {k: np.array([f[k] for f in rows.faults]) for k in names}
    def measured(v): return Measured('', '', 1., *(dict(zip(names, np.exp(o))) for o in v.reshape(2, -1)))
    def errors(v):
        half, steep = v.reshape(2, -1)  # logarithms, drawn a little towards one range and a power of 1.35
        return np.concatenate([(measured(v).loss(x)-y)/np.sqrt(y*(1-y)+.01), .1*half, .3*(steep-.3)])
    n, rng = len(names), np.random.default_rng(0)
    starts = [np.concatenate([rng.normal(-.5, .8, n), rng.normal(.3, .3, n)]) for _ in range(12)]
    limits = [-5]*n+[-.7]*n, [4]*n+[1.6]*n
    best = min((least_squares(errors, s.clip(*limits), loss='soft_l1', f_scale=.1, bounds=limits) for s in starts), key=lambda r: r.cost)
    return measured(best.x)

def fitted_to(backbones, kind): return fitted(Rows.joined([Rows.of(b) for b in backbones.values() if b['norm']==kind]))

def held_out(k, backbones):
    "Estimates for the pipelines of backbone `k`, each fitted without it"
    b = backbones[k]
    others = {n: o for n, o in backbones.items() if o['norm']==b['norm'] and n!=k} or {k: b}
    res, halves = np.zeros(len(b['pipelines'])), (slice(0, None, 2), slice(1, None, 2))
    for half, rest in (halves, halves[::-1]):
        m = fitted(Rows.joined([Rows.of(o, rest) for o in others.values()]))
        res[half] = [m.loss(f) for f in Rows.of(b, half).faults]
    return res

@dataclass
class Quality:
    "How well `estimate` follows `loss`"
    rank_correlation: float
    median_error: float
    largest_error: float

    @classmethod
    def of(cls, estimate, loss):
        e = abs(estimate-loss)
        return asdict(cls(float(spearmanr(estimate, loss).statistic), float(np.median(e)), float(e.max())))

def quality(backbones):
    "By backbone: `estimate`, `held_out`, and `changed` taken for an estimate"
    res = {}
    for k, b in backbones.items():
        rows, m = Rows.of(b), measured_on[b['norm']]
        ways = dict(estimate=[m.loss(f) for f in rows.faults], held_out=held_out(k, backbones))
        ways['changed'] = [r['changed'] for r in b['pipelines'].values()]
        res[b['name']] = dict(pipelines=len(rows.loss), **{n: Quality.of(np.array(v), rows.loss) for n, v in ways.items()})
    return res

def show(res):
    for b in res['backbones'].values():
        E = expected_stats(b['arch'])
        print(f"\n{b['name']} ({b['norm']}), {b['images']} images: {measured_on[b['norm']].task}")
        print('| pipeline                 | loss  | estimate | changed |')
        for n, r in sorted(b['pipelines'].items(), key=lambda o: o[1]['loss']):
            print(f"| {n:24} | {r['loss']:.3f} | {harm(E, (r['mean'], r['std']), b['norm']):8.3f} | {r['changed']:7.3f} |")
    print('\n| backbone           | pipelines |           | rank correlation | median error | largest error |')
    for k, q in res['quality'].items():
        for way in ('estimate', 'held_out', 'changed'):
            numbers = ' |'.join(f'{v:{n}.3f}' for v, n in zip(q[way].values(), (17, 13, 14)))
            print(f"| {k:18} | {q['pipelines']:9} | {way:9} |{numbers} |")

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', type=Path, help='folder of ImageNet images, see normalization_matters.py')
    p.add_argument('--backbone', nargs='+', choices=BACKBONES, default=list(BACKBONES))
    p.add_argument('--fit', action='store_true', help='print the constants that follow the saved measurements best')
    p.add_argument('--out', type=Path, default=RESULTS)
    a = p.parse_args()
    torch.set_num_threads(1)
    res = json.loads(a.out.read_text()) if a.out.exists() else dict(backbones={})
    def write(): a.out.write_text(dumps(rounded(res))+'\n')
    for k in a.backbone if a.data else ():
        def save(r, k=k):
            res['backbones'][k] = r
            write()
        measure(BACKBONES[k], a.data, res['backbones'].get(k, {}).get('pipelines', {}), save)
    if a.fit:
        for kind in measured_on:
            m = fitted_to(res['backbones'], kind)
            for name in ('half', 'steep'): print(kind, name, {k: float(f'{v:.3g}') for k, v in getattr(m, name).items()})
    res['quality'] = quality(res['backbones'])
    write()
    show(res)


if __name__ == '__main__': main()
