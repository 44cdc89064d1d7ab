"The estimate of cost against the measurements that are saved beside the benchmark, and the kind of normalization layers"
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from scipy.stats import spearmanr

from fastai_normx.constants import Affine
from fastai_normx.expected import expected_stats
from fastai_normx.harm import absorbs, harm, in_points, measured_on, norm_kind

saved = json.loads((Path(__file__).parent.parent/'benchmarks/results/severity.json').read_text(encoding='utf-8'))
ARCHS = {f'lite{n}': f'tf_efficientnet_lite{n}' for n in (0, 1, 2)} | {'vit': 'vit_small_patch14_dinov2'}


def losses(k):
    "Estimated and measured, one for each pipeline"
    b, E = saved['backbones'][k], expected_stats(ARCHS[k])
    rows = b['pipelines'].values()
    return np.array([harm(E, Affine(tuple(r['mean']), tuple(r['std'])), b['norm']) for r in rows]), np.array([r['loss'] for r in rows])


def fits(k):
    est, loss = losses(k)
    return spearmanr(est, loss).statistic >= .945 and np.median(abs(est-loss)) <= .03


@pytest.mark.parametrize('k', ARCHS)
def test_the_estimate_follows_what_was_measured(k):
    est, loss = losses(k)
    assert len(loss) >= 20 and len(set(loss)) > 15
    assert fits(k), (spearmanr(est, loss).statistic, np.median(abs(est-loss)))

@pytest.mark.parametrize('kind', measured_on)
@pytest.mark.parametrize('what', ['half', 'steep'])
@pytest.mark.parametrize('fault', ['beyond', 'flat', 'warm', 'green', 'light'])
def test_each_constant_is_needed(monkeypatch, kind, what, fault):
    "Three times as much or a third of any of them, and the measurements are followed worse by what a reader would notice"
    def error():
        return sum(abs(np.subtract(*losses(k))).mean() for k in ARCHS if saved['backbones'][k]['norm'] == kind)
    right, table = error(), getattr(measured_on[kind], what)
    for factor in (3, 1/3):
        with monkeypatch.context() as m:
            m.setitem(table, fault, table[fault]*factor)
            assert error() > 1.05*right, factor


def test_norm_says_whose_estimate():
    E, none = expected_stats('resnet18'), Affine((0,)*3, (1,)*3)
    bn, ln = harm(E, none, 'BatchNorm'), harm(E, none, 'LayerNorm')
    assert bn < ln/2 and harm(E, none) == harm(E, none, 'both') == pytest.approx((bn+ln)/2)


def test_shifts_that_differ_by_channel():
    "Measured on EfficientNet-Lite0: 0.07 and 0.034 of its accuracy"
    E = expected_stats(ARCHS['lite0'])
    apart, alike = harm(E, ((.3, .5, .7), E.std), 'BatchNorm'), harm(E, ((.3, .3, .3), E.std), 'BatchNorm')
    assert .04 < apart < .11 and alike < apart


def test_constants_that_cannot_be():
    "A std of nothing costs all"
    E = expected_stats('resnet18')
    for kind in (*measured_on, None): assert harm(E, (E.mean, (0.,)*3), kind) == 1


def test_what_is_right_is_what_was_saved():
    for kind, k in dict(BatchNorm='lite0', LayerNorm='vit').items():
        b = saved['backbones'][k]
        assert measured_on[kind].backbone == b['name'] and abs(measured_on[kind].right-b['pipelines']['expected']['correct']/b['images']) < .005


def test_the_sentence_says_points_of_what_and_of_whom():
    E, none = expected_stats('resnet18'), Affine((0,)*3, (1,)*3)
    for kind, b in measured_on.items():
        share = harm(E, none, kind)
        assert in_points(E, none, kind) == f'Estimated cost without training: {100*share*b.right:.0f} of {100*b.right:.0f} points of accuracy ({b.backbone}).'
    both = in_points(E, none)
    for kind, b in measured_on.items(): assert f'with {kind} ({b.backbone})' in both
    assert in_points(E, E) == '' and len(both.split()) <= 21


def test_what_normalization_layers_absorb():
    from torchvision.ops import FrozenBatchNorm2d
    bn, ln = nn.BatchNorm2d(3), nn.LayerNorm(3)
    assert absorbs(nn.Sequential(bn, nn.BatchNorm1d(4))).startswith('While it trains, its 1 BatchNorm layer absorb')
    assert absorbs(nn.Sequential(bn, ln)) == absorbs(nn.Sequential(bn)) and 'none of this' in absorbs(ln)
    for m in (nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)): assert absorbs(m) == ''  # which absorb, or not, by their groups
    assert 'frozen' in absorbs(nn.Sequential(FrozenBatchNorm2d(3))) and 'no BatchNorm' in absorbs(nn.Linear(2, 2)) and absorbs(None) == ''
    bn.requires_grad_(False)
    assert 'frozen' not in absorbs(nn.Sequential(bn)) and 'frozen' in absorbs(nn.Sequential(bn), bn_freeze=True)
    assert 'the first among them' in absorbs(nn.Sequential(bn, nn.BatchNorm2d(3)), bn_freeze=True), 'later layers are too late'
    assert 'absorb most' in absorbs(nn.Sequential(nn.BatchNorm2d(3), bn), bn_freeze=True)


timm = pytest.importorskip('timm')

@pytest.mark.parametrize('arch, kind', [('resnet18', 'BatchNorm'), ('tf_efficientnet_lite0', 'BatchNorm'), ('fastvit_t8', 'BatchNorm'), ('levit_128s', 'BatchNorm'),
    ('mobilenetv4_hybrid_medium', 'BatchNorm'), ('convnext_atto', 'LayerNorm'), ('vit_tiny_patch16_224', 'LayerNorm'), ('resnetv2_50x1_bit', 'LayerNorm'),
    ('resnet50_gn', 'LayerNorm'), ('efficientformer_l1', 'both'), ('xcit_nano_12_p8_224', 'both'), ('coatnet_nano_rw_224', 'both'), ('nf_resnet50', None)])
def test_kinds_of_backbones(arch, kind): assert norm_kind(timm.create_model(arch, pretrained=False)) == kind

def test_kinds_of_torchvision():
    from torchvision import models
    assert norm_kind(models.swin_t(weights=None)) == 'LayerNorm'
    frozen = models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, norm_layer=None)
    from torchvision.ops import FrozenBatchNorm2d
    assert norm_kind(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))) == norm_kind(frozen) == 'BatchNorm'

@pytest.mark.parametrize('layer, kind', [(nn.BatchNorm2d(8), 'BatchNorm'), (nn.SyncBatchNorm(8), 'BatchNorm'), (nn.LazyBatchNorm2d(), 'BatchNorm'), (nn.BatchNorm3d(8), 'BatchNorm'),
    (nn.LayerNorm(8), 'LayerNorm'), (nn.GroupNorm(2, 8), 'LayerNorm'), (nn.RMSNorm(8), 'LayerNorm'), (nn.InstanceNorm2d(8), None), (nn.LocalResponseNorm(2), None)])
def test_kinds_of_layers(layer, kind): assert norm_kind(nn.Sequential(nn.Conv2d(3, 8, 3), layer)) == kind

def test_kinds_of_other_libraries():
    class LlamaRMSNorm(nn.Module): pass
    assert norm_kind(LlamaRMSNorm()) == 'LayerNorm'  # a class of its own, known by its name
    class BatchNormless(nn.Linear): pass
    assert norm_kind(BatchNormless(2, 2)) is None

def test_a_head_does_not_make_it_both():
    "fastai's head brings BatchNorm1d to any body; LeViT has it within"
    from fastai.vision.learner import create_timm_model
    m = create_timm_model('convnext_atto', 2, pretrained=False)[0]
    assert any(isinstance(o, nn.BatchNorm1d) for o in m.modules()) and norm_kind(m) == 'LayerNorm'
    assert norm_kind(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))) == 'BatchNorm'

def test_kind_of_wrapped_models():
    m = timm.create_model('resnet18', pretrained=False)
    assert norm_kind(nn.DataParallel(m)) == norm_kind(torch.compile(m)) == 'BatchNorm'
    assert norm_kind(nn.SyncBatchNorm.convert_sync_batchnorm(m)) == 'BatchNorm'
    assert norm_kind(None) is None and norm_kind(nn.Linear(2, 2)) is None
