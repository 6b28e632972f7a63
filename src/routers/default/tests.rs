//! The default vectors, outputs and gradients of `default`, worked by hand.

use super::*;
use crate::dist::SingleRank;
use crate::ops::combine::combine;
use crate::routers::{LayerState, Pass};
use crate::tape::Gradients;
use std::rc::Rc;

/// The results of one training pass: y, ê after the pass, dz, de.
struct Outcome {
    y: Vec<f64>,
    vectors: Vec<f64>,
    dz: Vec<f64>,
    de: Vec<f64>,
}

/// Three tokens, three experts, K = 1, D = 2, β = 1/2.
///
/// z = ln (2, 1, 1), ln (1, 3, 4), ln (6, 1, 1), so p = (1/2, 1/4, 1/4), (1/8, 3/8, 1/2),
/// (3/4, 1/8, 1/8): tokens 0 and 2 choose expert 0, token 1 expert 2, none expert 1.
/// Outputs e_0(x_0) = (4, 0), e_0(x_2) = (0, 8), e_2(x_1) = (0, 8).
/// At the start ê_0 = (2, 0), ê_1 = (1, 1), ê_2 = (0, 4).
/// Incoming gradients g_0 = (1, 2), g_1 = (−1, 1), g_2 = (2, 0).
fn worked(router: DefaultMoe) -> Outcome {
    let ln = |row: [f64; 3]| row.map(f64::ln);
    let z = [
        ln([2.0, 1.0, 1.0]),
        ln([1.0, 3.0, 4.0]),
        ln([6.0, 1.0, 1.0]),
    ]
    .concat();
    let z = Var::leaf(Tensor::from_slice([3, 3], &z), 0);
    // Rows sorted by expert: (expert 0, token 0), (expert 0, token 2), (expert 2, token 1).
    let e = Var::leaf(
        Tensor::from_slice([3, 2], &[4.0, 0.0, 0.0, 8.0, 0.0, 8.0]),
        1,
    );
    let start = Tensor::from_slice([3, 2], &[2.0, 0.0, 1.0, 1.0, 0.0, 4.0]);
    let mut state = LayerState::new(vec![StateTensor {
        name: VECTORS,
        start,
    }]);

    let (tape, mut store) = (Tape::new(), Gradients::new(2));
    let pass = Pass::single(Phase::Train);
    let mut layer = LayerPass::new(pass, &SingleRank, 0, 1, 0, &mut state, false);
    // With the identity as the router's weight the logits are the layer's input.
    let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
    let weight = Var::constant(Tensor::from_slice([3, 3], &identity));
    let routing = router.route(&tape, &z, &weight, &mut layer).unwrap();
    let weights = routing.sum_weights.as_ref().unwrap_or(&routing.gates);
    let (weights, weighting) = (weights.tensor(), router.weighting().unwrap());
    let sums = ExpertSums::of_rows(e.tensor(), weights, weighting, &routing.dispatch).unwrap();
    let defaults = router.defaults(Some(sums), &mut layer).unwrap();
    let y = combine(
        &tape,
        &routing.gates,
        &e,
        defaults,
        &Rc::clone(&routing.dispatch),
    )
    .unwrap();
    let g = Tensor::from_slice([3, 2], &[1.0, 2.0, -1.0, 1.0, 2.0, 0.0]);
    tape.backward_from(&[(&y, g)], &mut store).unwrap();
    state.commit();
    let vectors = state.tensors().next().map(|(_, t)| t.to_f64().unwrap());
    Outcome {
        y: y.tensor().to_f64().unwrap(),
        vectors: vectors.unwrap(),
        dz: store.get(0).unwrap().to_f64().unwrap(),
        de: store.get(1).unwrap().to_f64().unwrap(),
    }
}

fn half() -> DefaultMoe {
    DefaultMoe {
        beta: 0.5,
        ..Default::default()
    }
}

pub(super) fn assert_close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= 1e-14, "{found:?}, expected {expected:?}");
    }
}

#[test]
fn the_moving_average_worked_by_hand_in_every_weighting() {
    // Weighted: m_0 = (1/2 (4, 0) + 3/4 (0, 8)) / (1/2 + 3/4) = (2, 6) / 1.25 = (1.6, 4.8),
    // ê_0 = ((2, 0) + (1.6, 4.8)) / 2 = (1.8, 2.4); ê_1 stays; ê_2 = ((0, 4) + (0, 8)) / 2.
    assert_close(&worked(half()).vectors, &[1.8, 2.4, 1.0, 1.0, 0.0, 6.0]);
    // Plain: m_0 = ((4, 0) + (0, 8)) / 2 = (2, 4), ê_0 = (2, 2).
    let plain = DefaultMoe {
        weighted: false,
        ..half()
    };
    assert_close(&worked(plain).vectors, &[2.0, 2.0, 1.0, 1.0, 0.0, 6.0]);
    // By count: m_0 = (2, 6) / 2 = (1, 3), ê_0 = (1.5, 1.5); m_2 = 1/2 (0, 8), ê_2 = (0, 4).
    let count = DefaultMoe {
        weight_norm: WeightNorm::Count,
        ..half()
    };
    assert_close(&worked(count).vectors, &[1.5, 1.5, 1.0, 1.0, 0.0, 4.0]);
}

#[test]
fn the_output_worked_by_hand_uses_the_updated_average() {
    // y_0 = 1/2 (4, 0) + 1/4 (1, 1) + 1/4 (0, 6),
    // y_1 = 1/8 (1.8, 2.4) + 3/8 (1, 1) + 1/2 (0, 8),
    // y_2 = 3/4 (0, 8) + 1/8 (1, 1) + 1/8 (0, 6).
    assert_close(&worked(half()).y, &[2.25, 1.75, 0.6, 4.675, 0.125, 6.875]);
}

#[test]
fn the_gradients_worked_by_hand() {
    // Token 0: s = (⟨g, e_0⟩, ⟨g, ê_1⟩, ⟨g, ê_2⟩) = (4, 3, 12), Σ p s = 5.75,
    //   dz = (1/2 (4 − 5.75), 1/4 (3 − 5.75), 1/4 (12 − 5.75)).
    // Token 1: s = (0.6, 0, 8), Σ p s = 4.075,
    //   dz = (1/8 (0.6 − 4.075), 3/8 (0 − 4.075), 1/2 (8 − 4.075)).
    // Token 2: s = (0, 2, 0), Σ p s = 0.25, dz = (3/4 (−0.25), 1/8 (1.75), 1/8 (−0.25)).
    let found = worked(half());
    assert_close(
        &found.dz,
        &[
            -0.875, -0.6875, 1.5625, -0.434375, -1.528125, 1.9625, -0.1875, 0.21875, -0.03125,
        ],
    );
    // de = p g of the expert that ran: 1/2 (1, 2), 3/4 (2, 0), 1/2 (−1, 1).
    assert_close(&found.de, &[0.5, 1.0, 1.5, 0.0, -0.5, 0.5]);
}

#[test]
fn without_pass_forward_the_output_is_that_of_topk_and_the_gradient_stays_dense() {
    let found = worked(DefaultMoe {
        pass_forward: false,
        ..half()
    });
    // y_t = p e of the chosen expert.
    assert_close(&found.y, &[2.0, 0.0, 0.0, 4.0, 0.0, 6.0]);
    assert_close(&found.dz, &worked(half()).dz);
}

#[test]
fn a_constant_factor_scales_the_vectors_only_when_they_are_used() {
    let found = worked(DefaultMoe {
        shrink: Shrink::Constant(0.5),
        ..half()
    });
    // ê itself does not change; y_0 = 1/2 (4, 0) + 1/2 (1/4 (1, 1) + 1/4 (0, 6)), and so on.
    let plain = worked(half());
    assert_close(&found.vectors, &plain.vectors);
    assert_close(&found.y, &[2.125, 0.875, 0.3, 4.3375, 0.0625, 6.4375]);
    // Token 0: s = (4, 3/2, 6), Σ p s = 3.875. Token 1: s = (0.3, 0, 8), Σ = 4.0375. Token 2: s = (0, 1, 0), Σ = 0.125.
    let dz = [
        0.0625, -0.59375, 0.53125, -0.4671875, -1.5140625, 1.98125, -0.09375, 0.109375, -0.015625,
    ];
    assert_close(&found.dz, &dz);
    assert_close(&found.de, &plain.de);
}

#[test]
fn renormalised_gates_worked_by_hand() {
    let found = worked(DefaultMoe {
        renormalize: true,
        ..half()
    });
    // q = p divided by its sum over the chosen experts: (1, 1/2, 1/2), (1/4, 3/4, 1), (1, 1/6, 1/6); ê is still
    // weighted by p.
    assert_close(&found.vectors, &worked(half()).vectors);
    // y_0 = (4, 0) + 1/2 (1, 1) + 1/2 (0, 6), y_1 = 1/4 (1.8, 2.4) + 3/4 (1, 1) + (0, 8), y_2 = (0, 8) + 1/6 (1, 1) + 1/6 (0,
    // 6).
    assert_close(&found.y, &[4.5, 3.5, 1.2, 9.35, 1.0 / 6.0, 8.0 + 7.0 / 6.0]);
    // s is the same as without renormalisation: (4, 3, 12), (0.6, 0, 8), (0, 2, 0); Σ q s = 11.5, 8.15, 1/3; dz_j =
    // q_j (s_j − 1[j∈A] Σ q s).
    let dz = [-7.5, 1.5, 6.0, 0.15, 0.0, -0.15, -1.0 / 3.0, 1.0 / 3.0, 0.0];
    assert_close(&found.dz, &dz);
    assert_close(&found.de, &[1.0, 2.0, 2.0, 0.0, -1.0, 1.0]);
}
