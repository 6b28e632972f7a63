//! The router's kernels on the simulator: every case of the library, every schedule, exact counts of work and bytes, what
//! they refuse.

use crate::support::refusals::{input, output, stream};
use crate::support::schedules::counted;
use crate::support::{check, check_cases, check_schedules, outputs};
use routegrad::kernels::bindings::*;
use routegrad::kernels::cost::{Cost, Sizes};
use routegrad::kernels::router::{RouterForward, RouterStatistics};
use routegrad::kernels::router_backward::{RouterBackward, RouterWeightGradient};
use routegrad::kernels::router_sample::RouterSample;
use routegrad::kernels::{In, Out};
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

/// Arguments of a launcher, by name; only refused calls are made, which touch no memory.
struct Call {
    pointers: Vec<(&'static str, usize)>,
    tokens: usize,
    experts: usize,
    hidden: usize,
    choices: usize,
    score: routegrad_score,
    layer: usize,
    epsilon: f64,
}

impl Call {
    fn address(&self, name: &str) -> usize {
        let found = self.pointers.iter().find(|p| p.0 == name);
        found.unwrap_or_else(|| panic!("no pointer {name}")).1
    }

    fn from<T>(&self, name: &str) -> In<'static, T> {
        input(self.address(name))
    }

    fn to<T>(&self, name: &str) -> Out<'static, T> {
        output(self.address(name))
    }
}

type Launch = fn(&Call) -> routegrad::error::Result<()>;

fn forward(a: &Call) -> routegrad::error::Result<()> {
    let kernel = RouterForward {
        scores: a.to("scores"),
        log_sum_exp: a.to("log_sum_exp"),
        choices: Some(a.to("choices")),
        partials: a.to("partials"),
        first_non_finite: a.to("first_non_finite"),
        x: a.from("x"),
        w: a.from("w"),
        selection_bias: Some(a.from("selection_bias")),
        tokens: a.tokens,
        experts: a.experts,
        hidden: a.hidden,
        choices_per_token: a.choices,
        score: a.score,
    };
    kernel.launch(&stream())
}

fn backward(a: &Call) -> routegrad::error::Result<()> {
    let kernel = RouterBackward {
        dx: a.to("dx"),
        dz: a.to("dz"),
        dw_partials: a.to("dw_partials"),
        scores: a.from("scores"),
        log_sum_exp: Some(a.from("log_sum_exp")),
        dscores: Some(a.from("dscores")),
        dmean: Some(a.from("dmean")),
        dlse2: Some(a.from("dlse2")),
        x: a.from("x"),
        w: a.from("w"),
        tokens: a.tokens,
        experts: a.experts,
        hidden: a.hidden,
        score: a.score,
        accumulate: false,
    };
    kernel.launch(&stream())
}

fn statistics(a: &Call) -> routegrad::error::Result<()> {
    let kernel = RouterStatistics {
        statistics: a.to("statistics"),
        partials: a.from("partials"),
        tokens: a.tokens,
        experts: a.experts,
    };
    kernel.launch(&stream())
}

fn weight_gradient(a: &Call) -> routegrad::error::Result<()> {
    let kernel = RouterWeightGradient {
        dw: a.to("dw"),
        dw_partials: a.from("dw_partials"),
        tokens: a.tokens,
        experts: a.experts,
        hidden: a.hidden,
        accumulate: false,
    };
    kernel.launch(&stream())
}

fn sample(a: &Call) -> routegrad::error::Result<()> {
    let kernel = RouterSample {
        experts_chosen: a.to("experts_chosen"),
        factors: a.to("factors"),
        kept: a.to("kept"),
        choices: a.to("choices"),
        logits: a.from("logits"),
        draws: None,
        tokens: a.tokens,
        experts: a.experts,
        stages: a.choices,
        layer: a.layer,
        epsilon: a.epsilon,
        threshold: 0.5,
        untrusted: 0.5,
    };
    kernel.launch(&stream())
}

/// The call with one change is refused with this reason, by name, and nothing is launched.
fn refused(
    launch: Launch,
    names: &[&'static str],
    change: &dyn Fn(&mut Call),
    why: &str,
    name: &str,
) {
    let room = [0u128; 16];
    let mut call = Call {
        pointers: names.iter().map(|&n| (n, room.as_ptr() as usize)).collect(),
        tokens: 4,
        experts: 8,
        hidden: 64,
        choices: 2,
        score: ROUTEGRAD_SCORE_SOFTMAX,
        layer: 0,
        epsilon: 0.1,
    };
    change(&mut call);
    let mut text = String::new();
    let counters = counted(|| text = launch(&call).expect_err(name).to_string());
    assert!(
        text.contains(&format!("argument `{name}` {why}")),
        "{name} {why}: {text}"
    );
    assert_eq!(counters.launches, 0, "{name}: something was launched");
}

#[test]
fn a_refused_argument_is_named_and_nothing_is_launched() {
    let range = "is outside what the kernel can do";
    // Launcher, its pointers, and how many of them, from the last, may be null or belong to an array.
    let launchers: [(Launch, &[&'static str], &[&str]); 5] = [
        (
            forward,
            &[
                "scores",
                "log_sum_exp",
                "choices",
                "partials",
                "first_non_finite",
                "x",
                "w",
                "selection_bias",
            ],
            &["selection_bias"],
        ),
        (
            backward,
            &[
                "dx",
                "dz",
                "dw_partials",
                "scores",
                "log_sum_exp",
                "dscores",
                "dmean",
                "dlse2",
                "x",
                "w",
            ],
            &["dscores", "dmean", "dlse2"],
        ),
        (statistics, &["statistics", "partials"], &[]),
        (weight_gradient, &["dw", "dw_partials"], &[]),
        (
            sample,
            &["experts_chosen", "factors", "kept", "choices", "logits"],
            &[],
        ),
    ];
    for (launch, names, nullable) in launchers {
        for (i, name) in names.iter().enumerate() {
            if !nullable.contains(name) {
                refused(
                    launch,
                    names,
                    &|a| a.pointers[i].1 = 0,
                    "is a null pointer",
                    name,
                );
            }
            if !["first_non_finite", "dlse2"].contains(name) {
                refused(
                    launch,
                    names,
                    &|a| a.pointers[i].1 += 4,
                    "is not 16-byte aligned",
                    name,
                );
            }
        }
        refused(launch, names, &|a| a.tokens = 0, range, "tokens");
        refused(launch, names, &|a| a.tokens = 1 << 31, range, "tokens");
        refused(launch, names, &|a| a.experts = 0, range, "experts");
        refused(launch, names, &|a| a.experts = 257, range, "experts");
    }
    for launcher in [0, 1, 3] {
        let (launch, names, _) = launchers[launcher];
        refused(launch, names, &|a| a.hidden = 0, range, "hidden");
        refused(
            launch,
            names,
            &|a| a.hidden = 60,
            "is not a multiple of 8",
            "hidden",
        );
    }
    let (launch, names, _) = launchers[0];
    refused(
        launch,
        names,
        &|a| a.choices = 9,
        range,
        "choices_per_token",
    );
    let many = |a: &mut Call| (a.experts, a.choices) = (32, 17);
    refused(launch, names, &many, range, "choices_per_token");
    for launcher in [0, 1] {
        let (launch, names, _) = launchers[launcher];
        refused(launch, names, &|a| a.score = 4, range, "score");
    }
    // Sigmoid and relu leave no softmax behind from which the gradient of mean lse² could come.
    let (launch, names, _) = launchers[1];
    for score in [ROUTEGRAD_SCORE_SIGMOID, ROUTEGRAD_SCORE_RELU] {
        refused(launch, names, &|a| a.score = score, range, "dlse2");
    }
    let (launch, names, _) = launchers[4];
    for wrong in [0, 3] {
        refused(launch, names, &|a| a.choices = wrong, range, "stages");
    }
    let one = |a: &mut Call| (a.experts, a.choices) = (1, 2);
    refused(launch, names, &one, range, "stages");
    refused(launch, names, &|a| a.layer = 1 << 24, range, "layer");
    for wrong in [-0.1, f64::NAN] {
        refused(launch, names, &|a| a.epsilon = wrong, range, "epsilon");
    }
}
