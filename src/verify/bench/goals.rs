//! The goals of the kernels, judged by the records of one GPU: each a ratio of medians measured together.

use super::case::{self, Work};
use super::peers::*;
use super::record::{Record, View};
use crate::device::machine::H200_PEAK;

/// What the records say of a goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Met,
    Missed,
    /// Not, or not on all of its shapes.
    NotMeasured,
}

impl Verdict {
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NotMeasured => "not measured",
        }
    }
}

/// One goal.
#[derive(Clone, Debug)]
pub struct Goal {
    pub number: usize,
    pub text: &'static str,
    pub verdict: Verdict,
    /// The numbers behind the verdict, or why there are none.
    pub measured: String,
}

/// Numbers of one demand over its cases: each must reach `least`.
struct Demand {
    what: &'static str,
    least: f64,
    /// What their geometric mean must reach, once all are there.
    mean: Option<f64>,
    /// Of each case that was measured.
    values: Vec<(String, f64)>,
    /// Cases that there are.
    cases: usize,
}

impl Demand {
    fn verdict(&self) -> Verdict {
        let mean = geometric_mean(self.values.iter().map(|v| v.1));
        let reaches = |wanted| mean.is_some_and(|mean| mean >= wanted);
        if !self.values.iter().all(|(_, value)| *value >= self.least) {
            Verdict::Missed
        } else if self.values.len() < self.cases || self.cases == 0 {
            Verdict::NotMeasured
        } else if self.mean.is_none_or(reaches) {
            Verdict::Met
        } else {
            Verdict::Missed
        }
    }

    fn text(&self) -> String {
        let (what, least, cases) = (self.what, self.least, self.cases);
        let mean = geometric_mean(self.values.iter().map(|v| v.1));
        let worst = self.values.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let (Some(mean), Some((case, worst))) = (mean, worst) else {
            return format!("{what}: none of {cases} cases");
        };
        let wanted = self
            .mean
            .map_or(String::new(), |mean| format!(" (wanted {mean:.2})"));
        format!(
            "{what}: geometric mean {mean:.3}{wanted}, least {worst:.3} (wanted {least:.3}) at {case}; {} of {cases} cases",
            self.values.len()
        )
    }
}

/// None of nothing.
pub fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

/// A goal of several demands: missed if one is, met if all are.
fn goal(number: usize, text: &'static str, demands: Vec<Demand>) -> Goal {
    let verdicts: Vec<Verdict> = demands.iter().map(Demand::verdict).collect();
    let verdict = if verdicts.contains(&Verdict::Missed) {
        Verdict::Missed
    } else if verdicts.contains(&Verdict::NotMeasured) {
        Verdict::NotMeasured
    } else {
        Verdict::Met
    };
    let texts: Vec<String> = demands.iter().map(Demand::text).collect();
    Goal {
        number,
        text,
        verdict,
        measured: texts.join(". "),
    }
}

/// A case of the core set with what the goals ask of it.
struct Asked {
    name: String,
    family: &'static str,
    /// "1.96b 8c1" of "layer_forward 1.96b 8c1".
    shape: String,
    experts: usize,
}

fn core() -> Vec<Asked> {
    let groups = case::groups().into_iter();
    let wanted = groups.filter(|g| g.set == case::Set::Core);
    let each = wanted.flat_map(|group| {
        let experts = match &group.work {
            Work::Gemm { shape, .. } => shape.counts.len(),
            Work::Layer(layer) => layer.counts.len(),
            _ => 0,
        };
        let cases = group.cases().unwrap_or_default().into_iter();
        cases.map(move |case| Asked {
            shape: case.name[case.family.len()..].trim().to_owned(),
            name: case.name,
            family: case.family,
            experts,
        })
    });
    each.collect()
}

/// Width of an expert, by the name of a shape.
fn expert_width(shape: &str) -> Option<usize> {
    let groups = case::groups().into_iter();
    let layers = groups.filter_map(|g| match g.work {
        Work::Layer(layer) if shape.starts_with(&g.name) => Some((g.name.len(), layer.ffn)),
        _ => None,
    });
    // The longest name: "1.96b 8c1 zipf" begins with "1.96b 8c1".
    layers.max().map(|(_, width)| width)
}

/// The nine goals, by the records of a GPU.
pub fn judge(view: &View) -> Vec<Goal> {
    let core = core();
    let demand =
        |what, least, wanted: &dyn Fn(&Asked) -> bool, value: &dyn Fn(&str) -> Option<f64>| {
            let asked: Vec<&Asked> = core.iter().filter(|asked| wanted(asked)).collect();
            let values = asked
                .iter()
                .filter_map(|a| Some((a.name.clone(), value(&a.name)?)));
            Demand {
                what,
                least,
                mean: None,
                values: values.collect(),
                cases: asked.len(),
            }
        };
    let gemm = |a: &Asked| a.family.starts_with("grouped_gemm");
    let dense = |a: &Asked| gemm(a) && a.experts == 1;
    let grouped = |a: &Asked| gemm(a) && a.experts > 1;
    let equal = |a: &Asked| grouped(a) && !a.shape.contains("zipf");
    let weight = |a: &Asked| a.family == "grouped_gemm_weight_gradient";
    let wide = |a: &Asked| expert_width(&a.shape).is_some_and(|width| width >= 1024);
    let to = |peer: &'static str| move |case: &str| view.ratio(case, peer);
    let layers = |families: &'static [&'static str], wanted: fn(&str) -> bool| {
        move |a: &Asked| families.contains(&a.family) && wanted(&a.shape)
    };
    let sonic = layers(&["layer_forward", "layer_backward"], |shape| {
        shape.starts_with("sonic")
    });
    let share = |case: &str| share_of_floor(view, case);

    let with_mean = |demand: Demand, mean| Demand {
        mean: Some(mean),
        ..demand
    };
    // A layer's two passes together.
    let both = |peer: &'static str| {
        move |case: &str| {
            let back = case.replace("layer_forward", "layer_backward");
            let sum = |name: Option<&str>| {
                let of = |case| match name {
                    Some(peer) => view.of(case, peer)?.seconds(),
                    None => view.seconds(case),
                };
                Some(of(case)? + of(&back)?)
            };
            Some(sum(Some(peer))? / sum(None)?)
        }
    };
    let part = |of: &'static str, whole: &'static str| {
        move |case: &str| Some(view.seconds(&case.replace(of, whole))? / view.seconds(case)?)
    };
    vec![
        goal(
            1,
            "dense GEMM ≥ 1.00 × cuBLAS, geometric mean over the model's shapes, none below 0.95",
            vec![with_mean(demand("dense over cuBLAS", 0.95, &dense, &to(CUBLAS)), 1.0)],
        ),
        goal(
            2,
            "grouped forward and input gradient ≥ 0.95 × an equal-group cuBLAS batch (expert width ≥ 1024), ≥ 0.90 below; weight gradient ≥ 0.90",
            vec![
                demand("width ≥ 1024", 0.95, &|a| equal(a) && wide(a) && !weight(a), &to(CUBLAS)),
                demand("narrower", 0.90, &|a| equal(a) && !wide(a) && !weight(a), &to(CUBLAS)),
                demand("weight gradient", 0.90, &|a| equal(a) && weight(a), &to(CUBLAS)),
            ],
        ),
        goal(
            3,
            "each grouped GEMM ≥ 1.15 × torch._grouped_mm; the layer's forward + backward ≥ 2.2 × a torch layer on it",
            vec![
                demand("grouped GEMMs", 1.15, &grouped, &to(TORCH_GROUPED)),
                demand("layers", 2.2, &layers(&["layer_forward"], |_| true), &both(TORCH_LAYER)),
            ],
        ),
        goal(
            4,
            "the layer ≥ 1.05 × SonicMoE over its shapes, none below 0.97",
            vec![with_mean(demand("each pass", 0.97, &sonic, &to(SONIC)), 1.05)],
        ),
        goal(
            5,
            "combine ≥ 0.95 of the copy's bandwidth; router forward ≤ 1.3 × the copy's time for E ≤ 64 and ≥ 4 × torch; attention ≥ 0.9 × cuDNN's",
            vec![
                demand("combine, share of the floor", 0.95, &|a| a.family == "combine", &share),
                demand(
                    "router, share of the floor",
                    1.0 / 1.3,
                    &|a| a.family == "router_forward" && a.experts <= 64,
                    &share,
                ),
                demand("router over torch", 4.0, &|a| a.family == "router_forward", &to(TORCH_COMPILED)),
                demand("attention over cuDNN", 0.9, &|a| a.family.starts_with("attention"), &to(CUDNN)),
            ],
        ),
        goal(
            6,
            "expert mean and its average ≤ 3% of the layer's forward; the gates' gradient ≤ 4% of its backward",
            vec![
                demand(
                    "forward over the means",
                    1.0 / 0.03,
                    &|a| a.family == "expert_mean",
                    &part("expert_mean", "default_layer_forward"),
                ),
                demand(
                    "backward over the gates' gradient",
                    1.0 / 0.04,
                    &|a| a.family == "gate_gradient",
                    &part("gate_gradient", "default_layer_backward"),
                ),
            ],
        ),
        default_over_topk(view),
        Goal {
            number: 8,
            text: "a layer keeps at most 2·T·D + 4·T·K·F + 4·T·E bytes and indices",
            verdict: Verdict::NotMeasured,
            measured: "not a matter of time: a test holds the kept bytes on the simulator (tests/training/devices.rs)".into(),
        },
        whole_steps(view),
    ]
}

fn share_of_floor(view: &View, case: &str) -> Option<f64> {
    view.of(case, super::record::OURS)
        .and_then(Record::share_of_floor)
}

fn default_over_topk(view: &View) -> Goal {
    let pairs = ["1.96b", "7.33b"].map(|model| {
        let of = |router| view.seconds(&format!("step {model} 8c1 {router}"));
        match (of("topk"), of("default")) {
            (Some(topk), Some(default)) => {
                format!(
                    "{model}, eager, each with its own routing: {:+.2}%",
                    100.0 * (default / topk - 1.0)
                )
            }
            _ => format!("{model}: no steps on record"),
        }
    });
    Goal {
        number: 7,
        text: "default against topk, whole step, graphs, one recorded routing: ≤ 0.7% at 1.96b, ≤ 0.14% at 7.33b",
        verdict: Verdict::NotMeasured,
        measured: format!("a step is no graph yet. {}", pairs.join(". ")),
    }
}

fn whole_steps(view: &View) -> Goal {
    let cases = ["step 1.96b 8c1 topk", "step 7.33b 8c1 topk"];
    let share = |case: &&str| {
        let record = view.of(case, super::record::OURS)?;
        Some((
            case.to_string(),
            record.flops / record.seconds()? / H200_PEAK,
        ))
    };
    let demand = Demand {
        what: "share of 989 TFLOP/s",
        least: 0.5,
        mean: None,
        values: cases.iter().filter_map(share).collect(),
        cases: cases.len(),
    };
    goal(
        9,
        "a whole training step ≥ 50% of 989 TFLOP/s at 1.96b 8c1 and 7.33b 8c1",
        vec![demand],
    )
}

#[cfg(test)]
mod tests {
    use super::super::record::OURS;
    use super::super::record::tests::record;
    use super::*;

    /// Goals by our seconds and a peer's for every core case of a kind.
    fn judged(ours: impl Fn(&str) -> f64, peers: &[(&'static str, f64)]) -> Vec<Goal> {
        let mut all = Vec::new();
        for asked in core() {
            all.push(record(&asked.name, OURS, ours(&asked.name)));
            all.extend(
                peers
                    .iter()
                    .map(|(peer, seconds)| record(&asked.name, peer, *seconds)),
            );
        }
        judge(&View(all.iter().collect()))
    }

    fn verdicts(goals: &[Goal]) -> Vec<Verdict> {
        goals.iter().map(|g| g.verdict).collect()
    }

    #[test]
    fn nothing_is_met_or_missed_without_records() {
        let goals = judge(&View(Vec::new()));
        assert_eq!(verdicts(&goals), [Verdict::NotMeasured; 9]);
        assert!(goals.iter().enumerate().all(|(i, g)| g.number == i + 1));
    }

    #[test]
    fn cublas_goals_turn_at_their_ratios() {
        let at = |ratio: f64| judged(|_| 1.0, &[(CUBLAS, ratio)]);
        assert_eq!(verdicts(&at(1.0))[..2], [Verdict::Met; 2]);
        assert_eq!(verdicts(&at(0.97))[..2], [Verdict::Missed, Verdict::Met]);
        assert_eq!(verdicts(&at(0.92))[..2], [Verdict::Missed; 2]);
        assert_eq!(verdicts(&at(1.0))[2], Verdict::NotMeasured);
    }

    #[test]
    fn one_slow_shape_misses_a_goal_and_is_named() {
        let slow = |case: &str| {
            if case == "grouped_gemm_forward dense 8192" {
                1.1
            } else {
                0.9
            }
        };
        let goals = judged(slow, &[(CUBLAS, 1.0)]);
        assert_eq!(goals[0].verdict, Verdict::Missed);
        assert!(
            goals[0]
                .measured
                .contains("grouped_gemm_forward dense 8192"),
            "{}",
            goals[0].measured
        );
        assert_eq!(goals[1].verdict, Verdict::Met);
    }

    #[test]
    fn a_goal_with_shapes_left_is_not_met() {
        let some = |case: &str| if case.contains("down") { -1.0 } else { 1.0 };
        let goals = judged(some, &[(CUBLAS, 1.2)]);
        assert_eq!(
            (goals[0].verdict, goals[1].verdict),
            (Verdict::Met, Verdict::NotMeasured)
        );
    }

    #[test]
    fn parts_of_a_layer_are_held_against_its_passes() {
        let times = |mean: f64, gates: f64| {
            move |case: &str| match case.split(' ').next() {
                Some("expert_mean") => mean,
                Some("gate_gradient") => gates,
                _ => 1.0,
            }
        };
        assert_eq!(judged(times(0.029, 0.039), &[])[5].verdict, Verdict::Met);
        assert_eq!(judged(times(0.031, 0.039), &[])[5].verdict, Verdict::Missed);
        assert_eq!(judged(times(0.029, 0.041), &[])[5].verdict, Verdict::Missed);
    }

    #[test]
    fn a_layer_is_held_against_peers_by_both_passes_together() {
        let forward_slow = |case: &str| {
            if case.starts_with("layer_forward") {
                1.5
            } else {
                0.5
            }
        };
        let torch = [(TORCH_GROUPED, 2.0), (TORCH_LAYER, 2.3)];
        assert_eq!(judged(forward_slow, &torch)[2].verdict, Verdict::Met);
        assert_eq!(judged(|_| 1.0, &[(SONIC, 1.06)])[3].verdict, Verdict::Met);
        assert_eq!(judged(|_| 1.0, &[(SONIC, 1.0)])[3].verdict, Verdict::Missed);
    }

    #[test]
    fn a_step_is_held_against_the_data_sheets_peak() {
        let step = |model: &str, share: f64| Record {
            flops: share * H200_PEAK,
            ..record(&format!("step {model} 8c1 topk"), OURS, 1.0)
        };
        let whole = |a: f64, b: f64| {
            let both = [step("1.96b", a), step("7.33b", b)];
            judge(&View(both.iter().collect()))[8].verdict
        };
        assert_eq!(
            (whole(0.5, 0.6), whole(0.381, 0.6)),
            (Verdict::Met, Verdict::Missed)
        );
    }
}
