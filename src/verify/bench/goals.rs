//! Evaluates the goals of the kernels from the records of one GPU. Each goal is a ratio of medians that were measured
//! together.

use super::case::{self, Work};
use super::groups;
use super::peers::*;
use super::record::{Record, View};
use crate::device::machine::H200_PEAK;

/// The state of a goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Reached for all of its shapes.
    Met,
    /// Measured, and not reached for every shape.
    Missed,
    /// Not measured, or not for all of its shapes.
    NotMeasured,
}

impl Verdict {
    /// Returns the text for the page.
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
    /// Number of the goal, from 1.
    pub number: usize,
    /// What must be reached.
    pub text: &'static str,
    /// Whether it is reached.
    pub verdict: Verdict,
    /// The numbers behind the verdict, or the reason why there are none.
    pub measured: String,
}

/// The measured values of one requirement; the value of each case must be at least `least`.
struct Demand {
    what: &'static str,
    least: f64,
    /// Minimum of their geometric mean, which is checked when all cases are measured.
    mean: Option<f64>,
    /// Value of each measured case.
    values: Vec<(String, f64)>,
    /// Number of cases.
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

/// Returns the geometric mean; `None` if there are no values.
pub fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

/// Combines several requirements into a goal: missed if one is missed, met if all are met.
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

/// A case of the core set with the properties by which goals select cases.
struct Asked {
    name: String,
    family: &'static str,
    /// "1.96b 8c1" for "layer_forward 1.96b 8c1".
    shape: String,
    experts: usize,
}

fn core() -> Vec<Asked> {
    let groups = groups::groups().into_iter();
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

/// Returns the width of an expert from the name of a shape.
fn expert_width(shape: &str) -> Option<usize> {
    let groups = groups::groups().into_iter();
    let layers = groups.filter_map(|g| match g.work {
        Work::Layer(layer) if shape.starts_with(&g.name) => Some((g.name.len(), layer.ffn)),
        _ => None,
    });
    // Selects the longest matching name, since "1.96b 8c1 zipf" begins with "1.96b 8c1".
    layers.max().map(|(_, width)| width)
}

/// The cases of the core set and their records.
struct Judge<'a> {
    core: Vec<Asked>,
    view: &'a View<'a>,
}

impl Judge<'_> {
    /// Collects `value` for the cases for which `wanted` is true.
    fn demand(
        &self,
        what: &'static str,
        least: f64,
        wanted: impl Fn(&Asked) -> bool,
        value: impl Fn(&str) -> Option<f64>,
    ) -> Demand {
        let asked: Vec<&Asked> = self.core.iter().filter(|asked| wanted(asked)).collect();
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
    }

    fn to(&self, peer: &'static str) -> impl Fn(&str) -> Option<f64> {
        move |case| self.view.ratio(case, peer)
    }

    fn share(&self) -> impl Fn(&str) -> Option<f64> {
        |case| share_of_floor(self.view, case)
    }

    /// Returns the ratio to a peer for the two passes of a layer together.
    fn both(&self, peer: &'static str) -> impl Fn(&str) -> Option<f64> {
        move |case| {
            let back = case.replace("layer_forward", "layer_backward");
            let sum = |name: Option<&str>| {
                let of = |case| match name {
                    Some(peer) => self.view.of(case, peer)?.seconds(),
                    None => self.view.seconds(case),
                };
                Some(of(case)? + of(&back)?)
            };
            Some(sum(Some(peer))? / sum(None)?)
        }
    }

    fn part(&self, of: &'static str, whole: &'static str) -> impl Fn(&str) -> Option<f64> {
        move |case| {
            let whole = self.view.seconds(&case.replace(of, whole))?;
            Some(whole / self.view.seconds(case)?)
        }
    }

    fn dense(&self) -> Goal {
        let dense = |a: &Asked| is_gemm(a) && a.experts == 1;
        let mut demand = self.demand("dense over cuBLAS", 0.95, dense, self.to(CUBLAS));
        demand.mean = Some(1.0);
        let text =
            "dense GEMM ≥ 1.00 × cuBLAS, geometric mean over the model's shapes, none below 0.95";
        goal(1, text, vec![demand])
    }

    fn grouped(&self) -> Goal {
        let equal = |a: &Asked| is_grouped(a) && !a.shape.contains("zipf");
        let weight = |a: &Asked| a.family == "grouped_gemm_weight_gradient";
        let wide = |a: &Asked| expert_width(&a.shape).is_some_and(|width| width >= 1024);
        let wide_rows = move |a: &Asked| equal(a) && wide(a) && !weight(a);
        let narrow_rows = move |a: &Asked| equal(a) && !wide(a) && !weight(a);
        let text = "grouped forward and input gradient ≥ 0.95 × an equal-group cuBLAS batch (expert width ≥ 1024), ≥ 0.90 below; weight gradient ≥ 0.90";
        let demands = vec![
            self.demand("width ≥ 1024", 0.95, wide_rows, self.to(CUBLAS)),
            self.demand("narrower", 0.90, narrow_rows, self.to(CUBLAS)),
            self.demand(
                "weight gradient",
                0.90,
                |a| equal(a) && weight(a),
                self.to(CUBLAS),
            ),
        ];
        goal(2, text, demands)
    }

    fn torch(&self) -> Goal {
        let text = "each grouped GEMM ≥ 1.15 × torch._grouped_mm; the layer's forward + backward ≥ 2.2 × a torch layer on it";
        let layers = |a: &Asked| a.family == "layer_forward";
        let demands = vec![
            self.demand("grouped GEMMs", 1.15, is_grouped, self.to(TORCH_GROUPED)),
            self.demand("layers", 2.2, layers, self.both(TORCH_LAYER)),
        ];
        goal(3, text, demands)
    }

    fn sonic(&self) -> Goal {
        let passes = |a: &Asked| ["layer_forward", "layer_backward"].contains(&a.family);
        let sonic = |a: &Asked| passes(a) && a.shape.starts_with("sonic");
        let mut demand = self.demand("each pass", 0.97, sonic, self.to(SONIC));
        demand.mean = Some(1.05);
        let text = "the layer ≥ 1.05 × SonicMoE over its shapes, none below 0.97";
        goal(4, text, vec![demand])
    }

    fn other_kernels(&self) -> Goal {
        let combine = |a: &Asked| a.family == "combine";
        let router = |a: &Asked| a.family == "router_forward";
        let few = |a: &Asked| router(a) && a.experts <= 64;
        let attention = |a: &Asked| a.family.starts_with("attention");
        let text = "combine ≥ 0.95 of the copy's bandwidth; router forward ≤ 1.3 × the copy's time for E ≤ 64 and ≥ 4 × torch; attention ≥ 0.9 × cuDNN's";
        let demands = vec![
            self.demand("combine, share of the floor", 0.95, combine, self.share()),
            self.demand("router, share of the floor", 1.0 / 1.3, few, self.share()),
            self.demand("router over torch", 4.0, router, self.to(TORCH_COMPILED)),
            self.demand("attention over cuDNN", 0.9, attention, self.to(CUDNN)),
        ];
        goal(5, text, demands)
    }

    fn default_vectors(&self) -> Goal {
        let means = |a: &Asked| a.family == "expert_mean";
        let gates = |a: &Asked| a.family == "default_layer_backward";
        let forward = self.part("expert_mean", "default_layer_forward");
        let backward = self.part("default_layer_backward", "layer_backward");
        let text = "expert mean and its average ≤ 3% of the layer's forward; default vectors lengthen its backward by ≤ 4%";
        let demands = vec![
            self.demand("forward over the means", 1.0 / 0.03, means, forward),
            self.demand(
                "backward without default vectors over that with them",
                1.0 / 1.04,
                gates,
                backward,
            ),
        ];
        goal(6, text, demands)
    }
}

fn is_gemm(a: &Asked) -> bool {
    a.family.starts_with("grouped_gemm")
}

fn is_grouped(a: &Asked) -> bool {
    is_gemm(a) && a.experts > 1
}

/// Returns the nine goals, evaluated from the records of a GPU.
pub fn judge(view: &View) -> Vec<Goal> {
    let judge = Judge { core: core(), view };
    vec![
        judge.dense(),
        judge.grouped(),
        judge.torch(),
        judge.sonic(),
        judge.other_kernels(),
        judge.default_vectors(),
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
        measured: format!(
            "{}. Replayed steps: the tasks `trains` of hardware-check",
            pairs.join(". ")
        ),
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

    /// Evaluates the goals for fixed times of ours and of a peer for every core case of a kind.
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
    fn cublas_goals_change_at_their_ratios() {
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
    fn a_goal_with_unmeasured_shapes_is_not_met() {
        let some = |case: &str| if case.contains("down") { -1.0 } else { 1.0 };
        let goals = judged(some, &[(CUBLAS, 1.2)]);
        assert_eq!(
            (goals[0].verdict, goals[1].verdict),
            (Verdict::Met, Verdict::NotMeasured)
        );
    }

    #[test]
    fn parts_of_a_layer_are_compared_with_its_passes() {
        let times = |mean: f64, backward: f64| {
            move |case: &str| match case.split(' ').next() {
                Some("expert_mean") => mean,
                Some("default_layer_backward") => backward,
                _ => 1.0,
            }
        };
        assert_eq!(judged(times(0.029, 1.039), &[])[5].verdict, Verdict::Met);
        assert_eq!(judged(times(0.031, 1.039), &[])[5].verdict, Verdict::Missed);
        assert_eq!(judged(times(0.029, 1.041), &[])[5].verdict, Verdict::Missed);
    }

    #[test]
    fn a_layer_is_compared_with_peers_by_both_passes_together() {
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
    fn a_step_is_compared_with_the_peak_of_the_data_sheet() {
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
