//! What the logs of the runs say: each run's figures, the means over the seeds of a group, and each
//! group against its baseline. docs/ablations.md defines every number.

use super::grid::{Plan, Run};
use super::names::with_axis;
use super::run::{State, folder, state};
use super::spikes::{self, Spikes};
use crate::error::{Error, Result};
use crate::report::metrics::{self, Record};
use crate::train::METRICS_FILE;
use std::collections::BTreeMap;
use std::path::Path;

/// Points of a run's curve of load balance.
const LOAD_POINTS: usize = 40;
/// Points of a run's curve of training loss: each the mean of as large a part of the steps.
const TRAINING_POINTS: usize = 50;

/// Values over tokens.
pub type Curve = Vec<(u64, f64)>;

/// What one run came to.
pub struct RunSummary {
    pub state: State,
    /// Steps and tokens done.
    pub steps: u64,
    pub tokens: u64,
    /// Cross-entropy of the evaluations, and of training, the mean of each fiftieth of the steps.
    pub validation: Curve,
    pub training: Curve,
    /// Of the last step's evaluation; none before the end, or where it is not finite.
    pub loss: Option<f64>,
    /// Mean training loss of the last twentieth of the steps.
    pub training_loss: Option<f64>,
    pub loss_spikes: Spikes,
    pub gradient_spikes: Spikes,
    /// Steps that were left out as not finite.
    pub left_out: u64,
    /// Coefficient of variation of the experts' loads over the last tenth of the steps: the mean
    /// over the MoE layers, and the worst of them.
    pub load: Option<(f64, f64)>,
    /// The mean over the layers, over the run.
    pub load_curve: Curve,
    /// Time of the steps, without evaluations and saving.
    pub seconds: f64,
}

/// Runs that differ in the seed alone.
pub struct Group {
    pub label: String,
    /// Its runs, by seed, and those of them that are finished with a finite loss.
    pub runs: Vec<usize>,
    pub finished: Vec<usize>,
    /// The group that it is held against: its own place where it is one.
    pub baseline: usize,
    /// Mean and deviation over the finished runs, at the tokens that all of them have.
    pub validation: Vec<Point>,
    pub training: Vec<Point>,
    pub load: Vec<Point>,
    pub loss: Option<Spread>,
}

/// A mean over seeds, and the sample standard deviation, none of a single one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub mean: f64,
    pub deviation: Option<f64>,
}

/// A [`Spread`] at a number of tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    pub tokens: u64,
    pub value: Spread,
}

/// All of a grid.
pub struct Summary {
    pub runs: Vec<RunSummary>,
    pub groups: Vec<Group>,
    /// Perplexity to reach, where the user chose it.
    pub target: Option<f64>,
}

/// Reads the logs of a plan's runs.
///
/// # Errors
/// When a folder holds another run, or `baseline` names no group.
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
    let last = |part: u64| -> &[Record] {
        &records[records.len() - (records.len() / part as usize).max(1).min(records.len())..]
    };
    let late: Vec<f64> = last(20).iter().filter_map(|r| r.loss).collect();
    let finished = state == State::Finished;
    let loss_at_end = records
        .last()
        .filter(|_| finished)
        .and_then(|r| r.validation_loss);
    let state = match finished && loss_at_end.is_none() {
        true => State::Diverged("the last validation loss is not finite".into()),
        false => state,
    };
    Ok(RunSummary {
        steps: records.last().map_or(0, |r| r.step),
        tokens: records.last().map_or(0, |r| r.tokens),
        validation: records
            .iter()
            .filter_map(|r| Some((r.tokens, r.validation_loss?)))
            .collect(),
        training: parts(TRAINING_POINTS).filter_map(part_loss).collect(),
        loss: loss_at_end,
        training_loss: spread(&late).filter(|_| finished).map(|s| s.mean),
        loss_spikes: spikes::find(&loss, steps),
        gradient_spikes: spikes::find(&series(|r| r.gradient_norm), steps),
        left_out: records.iter().filter(|r| !r.applied).count() as u64,
        load: variation(last(10)).filter(|_| finished),
        load_curve: parts(LOAD_POINTS)
            .filter_map(|part| Some((part.last()?.tokens, variation(part)?.0)))
            .collect(),
        seconds: records.iter().fold(0.0, |sum, r| sum + r.seconds),
        state,
    })
}

/// Tokens at the end of a part of the log, and its mean training loss.
fn part_loss(part: &[Record]) -> Option<(u64, f64)> {
    let losses: Vec<f64> = part.iter().filter_map(|r| r.loss).collect();
    Some((part.last()?.tokens, spread(&losses)?.mean))
}

/// Standard deviation of the experts' loads over their mean: the mean over layers, and the worst.
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
        let mean = sums.iter().sum::<f64>() / experts as f64;
        let variance = sums.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / experts as f64;
        variance.sqrt() / mean
    };
    let all: Vec<f64> = (0..layers).map(of).collect();
    let mean = all.iter().sum::<f64>() / layers as f64;
    let worst = all.iter().copied().fold(0.0, f64::max);
    Some((mean, worst)).filter(|v| v.0.is_finite())
}

/// Mean and sample deviation; none of nothing.
pub fn spread(values: &[f64]) -> Option<Spread> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (!values.is_empty()).then_some(Spread {
        mean,
        deviation: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()),
    })
}

/// Spread over curves at the tokens that all have.
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

/// Puts runs together that share all labels but the seed's, in the order of the grid.
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
    // Methods of one setting stand together.
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
        let own: Vec<usize> = (0..plan.runs.len())
            .filter(|r| key(&plan.runs[*r]) == *k)
            .collect();
        let finished: Vec<usize> = own
            .iter()
            .copied()
            .filter(|r| runs[*r].loss.is_some())
            .collect();
        let of = |f: fn(&RunSummary) -> &Curve| mean_curve(finished.iter().map(|r| f(&runs[*r])));
        let labels = varied.iter().zip(k).filter(|(_, l)| !l.is_empty());
        let label: Vec<String> = labels
            .map(|(a, l)| with_axis(&plan.axes[*a], l, " "))
            .collect();
        let losses: Vec<f64> = finished.iter().filter_map(|r| runs[*r].loss).collect();
        let against = sorted
            .iter()
            .position(|other| other.first() == base.as_ref() && rest(other) == rest(k));
        Group {
            label: match label.is_empty() {
                true => "all".into(),
                false => label.join(", "),
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
    /// Loss that the group is to reach: the user's, else that with which its baseline ends.
    pub fn target(&self, group: &Group) -> Option<f64> {
        let own = || self.groups[group.baseline].loss.map(|l| l.mean);
        self.target.map(f64::ln).or_else(own)
    }

    /// Tokens at which the group's mean validation loss reaches its target, and the share of the
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

    /// Runs of the group, each with the baseline's of the same seed.
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

    /// Baseline's final loss less the group's, over pairs of runs of one seed.
    pub fn gain(&self, plan: &Plan, group: &Group) -> Option<Spread> {
        let differences = self.pairs(plan, group);
        let differences: Vec<f64> = differences
            .filter_map(|(run, base)| Some(base.loss? - run.loss?))
            .collect();
        spread(&differences)
    }

    /// Baseline's validation loss less the group's over tokens, over the same pairs.
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

/// Tokens at which a curve first is at or below `target`, on the straight line from the point
/// before; none if it never is.
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
