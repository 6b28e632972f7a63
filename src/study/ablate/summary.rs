//! Statistics from the logs of the runs: the results of each run, the means over the seeds of a group, and the comparison
//! of each group with its baseline. docs/ablations.md defines every number.

use super::grid::{Plan, Run};
use super::names::with_axis;
use super::run::{State, folder, state};
use super::spikes::{self, Spikes};
use crate::error::{Error, Result};
use crate::report::metrics::{self, Record};
use crate::study::moments;
use crate::train::METRICS_FILE;
use std::collections::BTreeMap;
use std::path::Path;

/// Number of points in a run's curve of load balance.
const LOAD_POINTS: usize = 40;
/// Number of points in a run's curve of training loss; each is the mean of an equal part of the steps.
const TRAINING_POINTS: usize = 50;

/// Pairs of tokens and value.
pub type Curve = Vec<(u64, f64)>;

/// The results of one run.
pub struct RunSummary {
    pub state: State,
    /// Steps done.
    pub steps: u64,
    /// Tokens done.
    pub tokens: u64,
    /// Cross-entropy of the evaluations.
    pub validation: Curve,
    /// Cross-entropy of training: the mean of each fiftieth of the steps.
    pub training: Curve,
    /// Validation loss after the last step; `None` before the end, or if it is not finite.
    pub loss: Option<f64>,
    /// Mean training loss of the last twentieth of the steps.
    pub training_loss: Option<f64>,
    pub loss_spikes: Spikes,
    pub gradient_spikes: Spikes,
    /// Number of steps that were skipped because of non-finite values.
    pub left_out: u64,
    /// Coefficient of variation of the experts' loads over the last tenth of the steps: the mean over the MoE layers, and
    /// the largest value of a layer.
    pub load: Option<(f64, f64)>,
    /// Load imbalance during the run: the mean of the coefficient of variation over the layers.
    pub load_curve: Curve,
    /// Time of the steps in seconds, without evaluations and saving.
    pub seconds: f64,
}

/// Runs that differ only in the seed.
#[derive(Default)]
pub struct Group {
    pub label: String,
    /// Indices of its runs, by seed.
    pub runs: Vec<usize>,
    /// Indices of those runs that are finished with a finite loss.
    pub finished: Vec<usize>,
    /// Index of the group that this group is compared with; a baseline has its own index.
    pub baseline: usize,
    /// Mean and standard deviation over the finished runs, at the numbers of tokens that all of them have.
    pub validation: Vec<Point>,
    pub training: Vec<Point>,
    pub load: Vec<Point>,
    pub loss: Option<Spread>,
}

/// A mean over seeds and the sample standard deviation, which is `None` for a single run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub mean: f64,
    pub deviation: Option<f64>,
}

/// A [`Spread`] at one number of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub tokens: u64,
    pub value: Spread,
}

/// The results of a grid.
pub struct Summary {
    pub runs: Vec<RunSummary>,
    pub groups: Vec<Group>,
    /// Target perplexity, if the user set one.
    pub target: Option<f64>,
}

/// Reads the logs of a plan's runs.
///
/// # Errors
/// When a folder holds a different run, or `baseline` is not the name of a group.
pub fn summarize(
    out: &Path,
    plan: &Plan,
    baseline: Option<&str>,
    target: Option<f64>,
) -> Result<Summary> {
    let runs = plan.runs.iter().map(|run| summary(out, run));
    let runs = runs.collect::<Result<Vec<_>>>()?;
    let groups = groups(plan, &runs, baseline)?;
    Ok(Summary {
        runs,
        groups,
        target,
    })
}

fn summary(out: &Path, run: &Run) -> Result<RunSummary> {
    let state = state(out, run)?;
    let log = folder(out, &run.name).join(METRICS_FILE);
    let records: Vec<Record> = match log.exists() && state != State::New {
        true => metrics::read(&log)?.collect(),
        false => Vec::new(),
    };
    let steps = run.config.train.steps;
    let series = |f: fn(&Record) -> Option<f64>| -> Vec<(u64, f64)> {
        let known = records.iter().filter_map(|r| Some((r.step, f(r)?)));
        known.collect()
    };
    let loss = series(|r| r.loss);
    let parts = |n: usize| records.chunks(records.len().div_ceil(n).max(1));
    let last = |part: usize| -> &[Record] {
        let count = (records.len() / part).max(1);
        &records[records.len().saturating_sub(count)..]
    };
    let late: Vec<f64> = last(20).iter().filter_map(|r| r.loss).collect();
    let finished = state == State::Finished;
    let evaluated = records.iter();
    let evaluated = evaluated.filter_map(|r| Some((r.tokens, r.validation_loss?)));
    let end = records.last().filter(|_| finished);
    let loss_at_end = end.and_then(|r| r.validation_loss);
    let compared = loss_at_end.is_some();
    let state = match finished && !compared {
        true => State::Diverged("the last validation loss is not finite".into()),
        false => state,
    };
    Ok(RunSummary {
        steps: records.last().map_or(0, |r| r.step),
        tokens: records.last().map_or(0, |r| r.tokens),
        validation: evaluated.collect(),
        training: parts(TRAINING_POINTS).filter_map(part_loss).collect(),
        loss: loss_at_end,
        training_loss: spread(&late).filter(|_| compared).map(|s| s.mean),
        loss_spikes: spikes::find(&loss, steps),
        gradient_spikes: spikes::find(&series(|r| r.gradient_norm), steps),
        left_out: records.iter().filter(|r| !r.applied).count() as u64,
        load: variation(last(10)).filter(|_| compared),
        load_curve: parts(LOAD_POINTS)
            .filter_map(|part| Some((part.last()?.tokens, variation(part)?.0)))
            .collect(),
        seconds: records.iter().fold(0.0, |sum, r| sum + r.seconds),
        state,
    })
}

/// Returns the tokens at the end of a part of the log and its mean training loss.
fn part_loss(part: &[Record]) -> Option<(u64, f64)> {
    let losses: Vec<f64> = part.iter().filter_map(|r| r.loss).collect();
    Some((part.last()?.tokens, spread(&losses)?.mean))
}

/// Returns the standard deviation of the experts' loads divided by their mean: the mean over layers, and the largest.
fn variation(records: &[Record]) -> Option<(f64, f64)> {
    let layers = records.first()?.load.len();
    let of = |layer: usize| {
        let experts = records[0].load[layer].len();
        let mut sums = vec![0.0; experts];
        for record in records {
            let counts = record.load.get(layer).into_iter().flatten();
            sums.iter_mut()
                .zip(counts)
                .for_each(|(s, c)| *s += *c as f64);
        }
        let (mean, squares) = moments(sums.iter().copied());
        (squares / experts as f64).sqrt() / mean
    };
    let all: Vec<f64> = (0..layers).map(of).collect();
    let mean = all.iter().sum::<f64>() / layers as f64;
    let worst = all.iter().copied().fold(0.0, f64::max);
    Some((mean, worst)).filter(|v| v.0.is_finite())
}

/// Returns the mean and sample standard deviation; `None` for an empty slice.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let (mean, squares) = moments(values.iter().copied());
    let n = values.len() as f64;
    (!values.is_empty()).then_some(Spread {
        mean,
        deviation: (n > 1.0).then(|| (squares / (n - 1.0)).sqrt()),
    })
}

/// Returns the mean and standard deviation of curves at the numbers of tokens that all of them have.
fn mean_curve<'a>(curves: impl Iterator<Item = &'a Curve>) -> Vec<Point> {
    let mut at: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    let mut n = 0;
    for curve in curves {
        n += 1;
        for (tokens, value) in curve {
            at.entry(*tokens).or_default().push(*value);
        }
    }
    at.into_iter()
        .filter(|(_, values)| values.len() == n)
        .filter_map(|(tokens, values)| {
            let value = spread(&values)?;
            Some(Point { tokens, value })
        })
        .collect()
}

/// Groups the runs that have equal labels except for the seed, in the order of the grid.
fn groups(plan: &Plan, runs: &[RunSummary], baseline: Option<&str>) -> Result<Vec<Group>> {
    let varied = plan.varied();
    let key =
        |run: &Run| -> Vec<String> { varied.iter().map(|i| run.labels[*i].clone()).collect() };
    let mut keys: Vec<Vec<String>> = Vec::new();
    for run in &plan.runs {
        if !keys.contains(&key(run)) {
            keys.push(key(run));
        }
    }
    // Methods of the same setting are listed together.
    let rest = |k: &Vec<String>| k.get(1..).map(<[String]>::to_vec);
    let settings: Vec<_> = keys.iter().map(rest).collect();
    let mut sorted = keys.clone();
    sorted.sort_by_key(|k| settings.iter().position(|s| *s == rest(k)));

    let compared: Vec<&String> = sorted.iter().filter_map(|k| k.first()).collect();
    let base = match (baseline, keys.first().and_then(|k| k.first())) {
        (None, first) => first.cloned(),
        (Some(name), _) if compared.iter().any(|c| *c == name) => Some(name.to_string()),
        (Some(name), _) => {
            let mut names: Vec<&str> = compared.iter().map(|c| c.as_str()).collect();
            names.dedup();
            return Err(Error::usage(
                "baseline",
                format!("one of {}", names.join(", ")),
                format!("`{name}`"),
                "choose a value of the compared axis",
            ));
        }
    };
    let groups = sorted.iter().enumerate().map(|(i, k)| {
        let mut own: Vec<usize> = (0..plan.runs.len()).collect();
        own.retain(|r| key(&plan.runs[*r]) == *k);
        let mut finished = own.clone();
        finished.retain(|r| runs[*r].loss.is_some());
        let of = |f: fn(&RunSummary) -> &Curve| mean_curve(finished.iter().map(|r| f(&runs[*r])));
        let labels = varied.iter().zip(k).filter(|(_, l)| !l.is_empty());
        let labels = labels.map(|(a, l)| with_axis(&plan.axes[*a], l, " "));
        let label = labels.collect::<Vec<_>>().join(", ");
        let losses: Vec<f64> = finished.iter().filter_map(|r| runs[*r].loss).collect();
        let against = sorted
            .iter()
            .position(|other| other.first() == base.as_ref() && rest(other) == rest(k));
        Group {
            label: match label.is_empty() {
                true => "all".into(),
                false => label,
            },
            baseline: against.unwrap_or(i),
            validation: of(|r| &r.validation),
            training: of(|r| &r.training),
            load: of(|r| &r.load_curve),
            loss: spread(&losses),
            runs: own,
            finished,
        }
    });
    Ok(groups.collect())
}

impl Summary {
    /// Returns the loss that the group should reach: from the user's target perplexity, otherwise the final loss of its
    /// baseline.
    pub fn target(&self, group: &Group) -> Option<f64> {
        let own = || self.groups[group.baseline].loss.map(|l| l.mean);
        self.target.map(f64::ln).or_else(own)
    }

    /// Returns the number of tokens at which the group's mean validation loss reaches its target, and the share of the
    /// baseline's tokens that this saves.
    pub fn tokens_to_target(&self, group: &Group) -> (Option<f64>, Option<f64>) {
        let Some(target) = self.target(group) else {
            return (None, None);
        };
        let reached = |g: &Group| {
            let mean = g.validation.iter().map(|p| (p.tokens, p.value.mean));
            crossing(&mean.collect::<Curve>(), target)
        };
        let (own, base) = (reached(group), reached(&self.groups[group.baseline]));
        let saved = own.zip(base).map(|(own, base)| 1.0 - own / base);
        (own, saved)
    }

    /// Returns the runs of the group, each with the baseline's run of the same seed.
    pub(super) fn pairs<'a>(
        &'a self,
        plan: &'a Plan,
        group: &'a Group,
    ) -> impl Iterator<Item = (&'a RunSummary, &'a RunSummary)> {
        let seed = move |run: usize| plan.seed().map(|s| &plan.runs[run].labels[s]);
        let base = &self.groups[group.baseline].finished;
        group.finished.iter().filter_map(move |r| {
            let other = base.iter().find(|b| seed(**b) == seed(*r))?;
            Some((&self.runs[*r], &self.runs[*other]))
        })
    }

    /// Returns the baseline's final loss minus the group's, over pairs of runs with the same seed.
    pub fn gain(&self, plan: &Plan, group: &Group) -> Option<Spread> {
        let differences = self.pairs(plan, group);
        let differences: Vec<f64> = differences
            .filter_map(|(run, base)| Some(base.loss? - run.loss?))
            .collect();
        spread(&differences)
    }

    /// Returns the baseline's validation loss minus the group's as a function of tokens, over the same pairs.
    pub fn gain_curve(&self, plan: &Plan, group: &Group) -> Vec<Point> {
        let difference = |(run, base): (&RunSummary, &RunSummary)| -> Curve {
            let at = |(tokens, loss): &(u64, f64)| {
                let same = base.validation.iter().find(|b| b.0 == *tokens)?;
                Some((*tokens, same.1 - loss))
            };
            run.validation.iter().filter_map(at).collect()
        };
        let curves: Vec<Curve> = self.pairs(plan, group).map(difference).collect();
        mean_curve(curves.iter())
    }
}

/// Returns the number of tokens at which a curve first is at or below `target`, by linear interpolation from the previous
/// point; `None` if it never is.
pub fn crossing(curve: &[(u64, f64)], target: f64) -> Option<f64> {
    let i = curve.iter().position(|(_, loss)| *loss <= target)?;
    let (tokens, loss) = (curve[i].0 as f64, curve[i].1);
    let Some((before, higher)) = i.checked_sub(1).map(|j| curve[j]) else {
        return Some(tokens);
    };
    let part = (higher - target) / (higher - loss);
    Some(before as f64 + part * (tokens - before as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_reached_on_the_line_between_two_evaluations() {
        let curve = [(100, 4.0), (200, 3.0), (300, 2.0), (400, 2.5)];
        assert_eq!(crossing(&curve, 2.5), Some(250.0));
        assert_eq!(crossing(&curve, 2.0), Some(300.0));
        assert_eq!(crossing(&curve, 4.5), Some(100.0));
        assert_eq!(crossing(&curve, 1.9), None);
        assert_eq!(crossing(&[], 1.0), None);
    }

    #[test]
    fn spreads_are_those_of_a_sample() {
        let s = spread(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((s.mean, s.deviation), (2.0, Some(1.0)));
        assert_eq!(spread(&[5.0]).unwrap().deviation, None);
        assert_eq!(spread(&[]), None);
        let (a, b) = (vec![(1, 1.0), (2, 3.0)], vec![(2, 5.0), (3, 7.0)]);
        let mean = mean_curve([&a, &b].into_iter());
        assert_eq!(mean.len(), 1);
        assert_eq!((mean[0].tokens, mean[0].value.mean), (2, 4.0));
    }

    #[test]
    fn the_variation_of_loads_is_deviation_over_mean_by_layer() {
        let mut record = crate::report::metrics::tests::record(1);
        record.load = vec![vec![4, 4], vec![2, 6]];
        let (mean, worst) = variation(&[record.clone(), record]).unwrap();
        assert!((mean - 0.25).abs() < 1e-12 && (worst - 0.5).abs() < 1e-12);
        assert_eq!(variation(&[]), None);
    }
}
