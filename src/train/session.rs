//! The steps of a configuration, one after another, without a run's folder: what tests, timings and the hardware check train.

use crate::config::Config;
use crate::data::Corpus;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::Batch;
use crate::tensor::Tensor;
use crate::train::learning_rate;
use crate::train::step::{Launched, StepReport, Trainer};

/// A model, its optimizer and the text that its next step reads.
pub struct Training {
    pub config: Config,
    pub model: Model,
    pub trainer: Trainer,
    corpus: Corpus,
    /// Steps launched.
    step: u64,
    /// The last of them, where its report is still to be read.
    under_way: Option<Launched>,
}

impl Training {
    /// # Errors
    /// When the text cannot be read, or the model does not fit the device.
    pub fn new(config: Config) -> Result<Self> {
        let model = Model::new(&config)?;
        Ok(Training {
            trainer: Trainer::new(&config.train, &model),
            corpus: Corpus::load(&config.data, &config.model, config.train.seed)?,
            model,
            config,
            step: 0,
            under_way: None,
        })
    }

    /// Those of the next step.
    pub fn sequences(&self) -> Batch {
        let n = self.config.train.sequences_per_step as u64;
        self.corpus.sequences(self.step * n..(self.step + 1) * n)
    }

    /// Launches the next step, as [`Trainer::launch`] does.
    ///
    /// # Errors
    /// Those of a step.
    pub fn launch(&mut self) -> Result<Launched> {
        let batch = self.sequences();
        let train = &self.config.train;
        let parts: Vec<_> = batch.chunks(train.micro_batch).collect();
        let rate = learning_rate(train, self.step);
        self.step += 1;
        self.trainer.launch(&mut self.model, &parts, rate)
    }

    /// What became of it.
    ///
    /// # Errors
    /// Those of a step.
    pub fn report(&mut self, launched: Launched) -> Result<StepReport> {
        self.trainer.report(&mut self.model, launched)
    }

    /// A whole step.
    ///
    /// # Errors
    /// Those of a step, and when a number in it was not finite.
    pub fn step(&mut self) -> Result<StepReport> {
        let launched = self.next_launched()?;
        self.accepted(launched)
    }

    /// The same, the step behind it launched before its report is read where that may be: as a run does.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_ahead(&mut self) -> Result<StepReport> {
        let launched = self.next_launched()?;
        if launched.was_replayed() {
            self.under_way = Some(self.launch()?);
        }
        self.accepted(launched)
    }

    /// The step that is under way, or else the next.
    fn next_launched(&mut self) -> Result<Launched> {
        match self.under_way.take() {
            Some(launched) => Ok(launched),
            None => self.launch(),
        }
    }

    fn accepted(&mut self, launched: Launched) -> Result<StepReport> {
        let report = self.report(launched)?;
        let step = self.step - u64::from(self.under_way.is_some());
        match report.refused {
            None => Ok(report),
            Some(what) => Err(Error::NonFinite {
                what: format!("{what} in step {step}"),
                help: "lower train.learning_rate; if the preset's is set, report a bug".into(),
            }),
        }
    }

    /// Name and digest of everything that a step may change: weights, moments, what routers keep, the number of steps.
    ///
    /// # Errors
    /// When the device failed.
    pub fn digests(&self) -> Result<Vec<(String, blake3::Hash)>> {
        let all = |t: &Tensor| t.copied_bytes(0..t.elements() * t.dtype().size());
        let mut found = Vec::new();
        let mut add = |name: String, bytes: &[u8]| found.push((name, blake3::hash(bytes)));
        for (p, moments) in (self.model.parameters.iter()).zip(self.trainer.optimizer.moments()) {
            add(p.name.clone(), &p.value.bytes(0..p.value.elements())?);
            add(format!("first moment of {}", p.name), &all(&moments.first)?);
            add(
                format!("second moment of {}", p.name),
                &all(&moments.second)?,
            );
        }
        for (layer, state) in self.model.layer_states().iter().enumerate() {
            for (name, tensor) in state.tensors() {
                add(format!("{name} of MoE layer {layer}"), &all(tensor)?);
            }
        }
        let steps = self.trainer.optimizer.steps();
        add("number of steps".into(), &steps.to_le_bytes());
        Ok(found)
    }
}
