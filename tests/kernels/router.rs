//! The router's kernels on the simulator: every case of the library, every schedule, exact counts of work and bytes, what
//! they refuse.

use crate::support::refusals::refuses;
use crate::support::schedules::counted;
use crate::support::{check, check_cases, check_schedules, outputs};
use routegrad::kernels::bindings::*;
use routegrad::kernels::cost::{Cost, Sizes};
use routegrad::kernels::router::{RouterForward, RouterStatistics};
use routegrad::kernels::router_backward::{RouterBackward, RouterWeightGradient};
use routegrad::kernels::router_sample::RouterSample;
use routegrad::verify::kernels::router::{Batch, Kind, Shape, problem, problem_of};
use routegrad::verify::kernels::{Buffer, Problem, router_backward, router_sample, values};

#[test]
fn forward_has_the_accuracy_of_f32_and_chooses_by_its_own_scores() {
    check_cases("router_forward");
}

#[test]
fn statistics_are_the_sums_of_all_blocks() {
    check_cases("router_statistics");
}

#[test]
fn backward_is_within_f32_roundoff_and_one_rounding_to_bf16() {
    check_cases("router_backward");
}

#[test]
fn sampling_draws_what_the_cpu_draws() {
    check_cases("router_sample");
}

#[test]
fn every_schedule_and_thread_count_gives_the_same_bytes() {
    for launcher in [
        "router_forward",
        "router_statistics",
        "router_backward",
        "router_sample",
    ] {
        check_schedules(launcher);
    }
}

fn shape(tokens: usize, experts: usize, hidden: usize, choices: usize, kind: Kind) -> Shape {
    Shape {
        tokens,
        experts,
        hidden,
        choices,
        score: ROUTEGRAD_SCORE_SOFTMAX,
        kind,
    }
}

#[test]
fn equal_logits_give_equal_shares_the_first_experts_and_the_entropy_of_all() {
    let mut batch = Batch::new(shape(130, 12, 40, 3, Kind::Ordinary));
    batch.w.fill(0.0);
    batch.logits.fill((0.0, 0.0));
    let problem = problem_of(batch).unwrap_or_else(|e| panic!("{e}"));
    let out = outputs(&problem);
    let (scores, choices): (Vec<f32>, Vec<i32>) = (values(&out[0]), values(&out[2]));
    assert!(scores.iter().all(|&p| (p * 12.0 - 1.0).abs() < 1e-6));
    assert!(choices.chunks(3).all(|c| c == [0, 1, 2]));
    let statistics: Vec<f32> = values(&out[4]);
    assert_eq!(
        statistics[12..24],
        [[130.0; 3].as_slice(), &[0.0; 9]].concat()
    );
    for mean in [statistics[24].sqrt(), statistics[25]] {
        assert!((mean - 12f32.ln()).abs() < 1e-5, "{mean}");
    }
}

#[test]
fn the_flag_keeps_an_earlier_token() {
    for (before, after) in [(i32::MAX, 1), (5, 1), (0, 0)] {
        let made = problem(shape(40, 8, 72, 2, Kind::NonFinite));
        let mut problem = made.unwrap_or_else(|e| panic!("{e}"));
        problem.buffers[3] = Buffer::changed("first_non_finite", &[before]);
        assert_eq!(values::<i32>(&outputs(&problem)[3]), [after]);
    }
}

/// Holds a run against the formula exactly; `again`: bytes that caches serve a second time.
fn counts_are(problem: &Problem, cost: Cost, again: usize) {
    let counters = counted(|| check(problem));
    assert_eq!(counters.tensor_flops as f64, cost.flops);
    let bytes = (counters.bytes_read + counters.bytes_written) as f64;
    assert_eq!(bytes, cost.bytes + again as f64);
}

fn sizes((tokens, experts, hidden): (usize, usize, usize), slots: usize) -> Sizes {
    Sizes {
        tokens,
        hidden,
        ffn: 0,
        experts,
        slots,
        rows: tokens * slots,
    }
}

#[test]
fn forward_moves_the_bytes_and_multiplies_what_its_header_says() {
    for (t, e, d, k, kind) in [
        (300, 20, 136, 3, Kind::Biased),
        (128, 7, 64, 0, Kind::Ordinary),
        (257, 64, 328, 8, Kind::Ordinary),
    ] {
        let problem = problem(shape(t, e, d, k, kind)).unwrap_or_else(|e| panic!("{e}"));
        // W once per 128 tokens; the bias once per token.
        let blocks = t.div_ceil(128);
        let bias = if kind == Kind::Biased {
            4 * 128 * blocks * e
        } else {
            0
        };
        let again = 4 * e * d * (blocks - 1) + bias;
        counts_are(&problem, RouterForward::cost(&sizes((t, e, d), k)), again);
    }
}

#[test]
fn backward_moves_the_bytes_and_multiplies_what_its_header_says() {
    for (t, e, d, runs, score, accumulate) in [
        (331, 20, 136, 2, ROUTEGRAD_SCORE_SOFTMAX, true),
        (131, 7, 64, 1, ROUTEGRAD_SCORE_SOFTMAX, false),
        (600, 64, 328, 3, ROUTEGRAD_SCORE_LOGITS, false),
    ] {
        let problem = router_backward::problem(router_backward::Shape {
            tokens: t,
            experts: e,
            hidden: d,
            score,
            accumulate,
            given: [true; 3],
        });
        let problem = problem.unwrap_or_else(|e| panic!("{e}"));
        // Softmax reads a row's scores, their gradient and the means' twice; all lanes of a quad read a token's scalars
        // (32 bytes); dz once per 128 columns; W once per 128 tokens.
        let passes = if score == ROUTEGRAD_SCORE_SOFTMAX {
            2
        } else {
            1
        };
        let (blocks, columns) = (t.div_ceil(128), d.div_ceil(128));
        let again = (12 * passes + 4 * columns - 12) * t * e + 28 * t - 4 * e;
        let cost = RouterBackward::cost(&sizes((t, e, d), 0), accumulate, runs);
        counts_are(&problem, cost, again + 4 * e * d * (blocks - 1));
    }
}

#[test]
fn sampling_moves_the_bytes_that_its_header_says() {
    let (t, e, s) = (301, 33, 2);
    let problem = router_sample::problem(router_sample::Shape {
        tokens: t,
        experts: e,
        stages: s,
        sampled: true,
        logits: router_sample::Logits::Near,
    });
    let problem = problem.unwrap_or_else(|e| panic!("{e}"));
    let counters = counted(|| check(&problem));
    assert_eq!(counters.bytes_read, (4 * t * e + 24 * 32 * t) as u64);
    assert_eq!(counters.bytes_written, (4 * t * s * (e + 3)) as u64);
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    refuses!(
        RouterForward {
            scores, log_sum_exp, choices, partials, first_non_finite[unaligned], x, w,
            selection_bias[optional];
            tokens: 4, experts: 8, hidden: 64, choices_per_token: 2, score: ROUTEGRAD_SCORE_SOFTMAX
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; experts: 0, 257; hidden: 0; score: 4;
            choices_per_token: 9; [experts: 32] choices_per_token: 17
        }
        NOT_MULTIPLE { hidden: 60 }
    );
    refuses!(
        RouterBackward {
            dx, dz, dw_partials, scores, log_sum_exp, dscores[optional], dmean[optional], x, w;
            dlse2: Pointer::good(), tokens: 4, experts: 8, hidden: 64, score: ROUTEGRAD_SCORE_SOFTMAX,
            accumulate: false
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; experts: 0, 257; hidden: 0; score: 4;
            // Sigmoid and relu leave no softmax behind from which the gradient of mean lse² could come.
            [score: ROUTEGRAD_SCORE_SIGMOID] dlse2: Pointer::good();
            [score: ROUTEGRAD_SCORE_RELU] dlse2: Pointer::good()
        }
        NOT_MULTIPLE { hidden: 60 }
    );
    refuses!(
        RouterStatistics { statistics, partials; tokens: 4, experts: 8 }
        OUT_OF_RANGE { tokens: 0, 1 << 31; experts: 0, 257 }
    );
    refuses!(
        RouterWeightGradient {
            dw, dw_partials;
            tokens: 4, experts: 8, hidden: 64, accumulate: false
        }
        OUT_OF_RANGE { tokens: 0, 1 << 31; experts: 0, 257; hidden: 0 }
        NOT_MULTIPLE { hidden: 60 }
    );
    refuses!(
        RouterSample {
            experts_chosen, factors, kept, choices, logits;
            draws: None, tokens: 4, experts: 8, stages: 2, layer: 0, epsilon: 0.1, threshold: 0.5,
            untrusted: 0.5
        }
        OUT_OF_RANGE {
            tokens: 0, 1 << 31; experts: 0, 257; stages: 0, 3; [experts: 1] stages: 2;
            layer: 1 << 24; epsilon: -0.1, f64::NAN
        }
    );
}
