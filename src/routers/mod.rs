//! The routers, one a file, and their registry.
//!
//! A router turns a layer's input `x [T, D]` into gates `[T, E]` and, for every token, the experts that run:
//! nothing outside this folder knows which method does so. A new router is a file here and a line in
//! [`ROUTERS`]; or a type of one's own passed to [`Model::with_router`](crate::model::Model::with_router).

pub mod default;
pub mod dense;
pub mod densemixer;
pub mod lossfree;
pub mod remoe;
pub mod sparsemixer;
mod state;
mod tally;
pub mod topk;

pub use state::{Disagreement, LayerPass, LayerState, LayerStats, Pass, Phase};
pub(crate) use tally::DeviceTally;

use crate::config::{ModelConfig, RouterConfig};
use crate::dist::Collective;
use crate::error::{Error, Result};
use crate::ops::combine::Defaults;
use crate::ops::dispatch::Dispatch;
use crate::ops::expert_mean::{ExpertSums, Weighting};
use crate::ops::renormalize::renormalize;
use crate::ops::routing::Scores;
use crate::report::nearest;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::rc::Rc;

/// What a router decided for one micro-batch of one layer.
pub struct Routing {
    /// `[T, E]`: weight of each expert's output; off the chosen experts that of its default vector,
    /// if there is one, else unused.
    pub gates: Var,
    /// What the balance losses and the statistics see.
    pub scores: Scores,
    /// The experts that run for each token.
    pub dispatch: Rc<Dispatch>,
    /// The experts that count as chosen, where those that run are others.
    pub chosen: Option<Rc<Dispatch>>,
    /// The loss of a router with [`Balance::Own`], a scalar with its coefficient.
    pub penalty: Option<Var>,
}

impl Routing {
    /// Experts that run because they were chosen, and no loss.
    pub fn new(gates: Var, scores: Scores, dispatch: Rc<Dispatch>) -> Self {
        Routing {
            gates,
            scores,
            dispatch,
            chosen: None,
            penalty: None,
        }
    }

    /// The chosen experts run, weighted by their scores.
    ///
    /// # Errors
    /// When a choice cannot be made.
    pub fn by_scores(scores: Scores, layer: &mut LayerPass<'_>) -> Result<Self> {
        let dispatch = layer.select(|| scores.choose())?;
        Ok(Self::new(scores.values.clone(), scores, dispatch))
    }

    /// The same with weights that sum to 1 over the experts that run.
    ///
    /// # Errors
    /// When the gates do not fit the dispatch.
    pub fn renormalized(mut self, tape: &Tape) -> Result<Self> {
        self.gates = renormalize(tape, &self.gates, &self.dispatch)?;
        Ok(self)
    }

    /// The experts whose counts balance losses and statistics see.
    pub fn chosen(&self) -> &Dispatch {
        self.chosen.as_ref().unwrap_or(&self.dispatch)
    }
}

/// The loss that keeps the experts' loads even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// The auxiliary loss and the z-loss, as the configuration weights them.
    Auxiliary,
    /// The router's own, [`Routing::penalty`], which is added to the loss as it is.
    Own,
    /// None.
    None,
}

/// A vector that a router learns, for one layer; it does not decay.
pub struct OwnParameter {
    /// Name in checkpoints, behind the layer's prefix.
    pub name: &'static str,
    pub length: usize,
    /// What every entry begins with.
    pub start: f64,
}

/// A tensor that a router keeps from step to step, for one layer.
pub struct StateTensor {
    /// Name in checkpoints, behind the layer's prefix.
    pub name: &'static str,
    pub start: Tensor,
}

/// A method of routing. One value serves all layers; what differs by layer is in [`LayerPass`].
pub trait Router {
    /// Refuses models that the method cannot train.
    ///
    /// # Errors
    /// Names the key to change.
    fn validate(&self, _model: &ModelConfig) -> Result<()> {
        Ok(())
    }

    /// The state of one MoE layer at the start of training, in f64: the model rounds it to its
    /// dtype. `layer` counts MoE layers from 0.
    fn initial_state(&self, _model: &ModelConfig, _layer: usize, _seed: u64) -> Vec<StateTensor> {
        Vec::new()
    }

    /// The vectors that the method learns in each MoE layer.
    fn parameters(&self, _model: &ModelConfig) -> Vec<OwnParameter> {
        Vec::new()
    }

    /// Chooses experts and gates from the layer's input `[T, D]` and its router weight `[E, D]`.
    ///
    /// # Errors
    /// When the two do not fit.
    fn route(
        &self,
        tape: &Tape,
        x: &Var,
        weight: &Var,
        layer: &mut LayerPass<'_>,
    ) -> Result<Routing>;

    /// How the experts' outputs are to be summed for [`defaults`](Self::defaults); none if the
    /// method does not need them.
    fn weighting(&self) -> Option<Weighting> {
        None
    }

    /// Gives the default vectors of the experts that did not run, if the method has any. `sums` are
    /// those of the experts that ran; they are there when the router asked for them and the pass
    /// may change state.
    ///
    /// # Errors
    /// When the sums do not fit the state.
    fn defaults(
        &self,
        _sums: Option<ExpertSums>,
        _layer: &mut LayerPass<'_>,
    ) -> Result<Option<Defaults>> {
        Ok(None)
    }

    /// What the method makes of the combined output `y [T, D]` with its own parameters.
    ///
    /// # Errors
    /// When `y` does not fit.
    fn output(&self, _tape: &Tape, y: Var, _own: &[Var]) -> Result<Var> {
        Ok(y)
    }

    /// Changes the pending state of the layers at the end of an accepted optimizer step, before it
    /// is committed. What a layer counted is this rank's: sums over ranks go through `dist`.
    ///
    /// # Errors
    /// When a state tensor is not real, or a sum over ranks fails.
    fn end_step(
        &self,
        _model: &ModelConfig,
        _layers: &mut [LayerState],
        _dist: &dyn Collective,
    ) -> Result<()> {
        Ok(())
    }

    /// The loss that balances the experts.
    fn balance(&self) -> Balance {
        Balance::Auxiliary
    }
}

/// A router's entry in the registry.
pub struct RouterInfo {
    /// Name in configurations and on the command line.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    /// What it costs beside `topk`.
    pub cost: &'static str,
    /// What each setting does.
    pub settings: &'static [(&'static str, &'static str)],
    build: Build,
}

/// Reads settings: the router, and the settings with every default filled in.
type Build = fn(&toml::Table) -> Result<(Box<dyn Router>, toml::Table)>;

/// Every router.
pub const ROUTERS: &[RouterInfo] = &[
    topk::INFO,
    default::INFO,
    dense::INFO,
    densemixer::INFO,
    sparsemixer::INFO,
    remoe::INFO,
    lossfree::INFO,
];

/// Builds the router that a configuration names.
///
/// # Errors
/// When there is no such router, or it does not take a setting: both name the nearest right one.
pub fn build(config: &RouterConfig) -> Result<Box<dyn Router>> {
    Ok((find(&config.name)?.build)(&config.settings)?.0)
}

/// Checks a router's configuration and fills in its defaults.
///
/// # Errors
/// As [`build`].
pub fn resolve(config: &mut RouterConfig) -> Result<()> {
    config.settings = (find(&config.name)?.build)(&config.settings)?.1;
    Ok(())
}

fn find(name: &str) -> Result<&'static RouterInfo> {
    ROUTERS.iter().find(|r| r.name == name).ok_or_else(|| {
        let names: Vec<&str> = ROUTERS.iter().map(|r| r.name).collect();
        let close = nearest(name, names.iter().copied());
        Error::invalid(
            "router.name",
            format!("one of {}", names.join(", ")),
            format!("\"{name}\""),
            close.map_or("choose one of them".into(), |n| {
                format!("did you mean \"{n}\"?")
            }),
        )
    })
}

/// [`RouterInfo::build`] for a router whose fields are its settings.
fn from_settings<R>(settings: &toml::Table) -> Result<(Box<dyn Router>, toml::Table)>
where
    R: Router + Default + Serialize + DeserializeOwned + 'static,
{
    let table = |router: &R| match toml::Table::try_from(router) {
        Ok(table) => table,
        Err(e) => unreachable!("settings are plain values: {e}"),
    };
    let known = table(&R::default());
    if let Some(key) = settings.keys().find(|k| !known.contains_key(*k)) {
        let keys: Vec<&str> = known.keys().map(String::as_str).collect();
        let close = nearest(key, keys.iter().copied());
        return Err(Error::invalid(
            format!("router.{key}"),
            if keys.is_empty() {
                "no settings for this router".into()
            } else {
                format!("one of the settings {}", keys.join(", "))
            },
            format!("\"{key}\""),
            close.map_or("remove it".into(), |k| format!("did you mean router.{k}?")),
        ));
    }
    let router: R = settings.clone().try_into().map_err(|e: toml::de::Error| {
        Error::invalid(
            "router",
            "settings of the right type",
            e.message().to_string(),
            "see `routegrad routers`",
        )
    })?;
    let resolved = table(&router);
    Ok((Box::new(router), resolved))
}

/// Refuses a setting outside `least ..`, or with `below` outside `least .. below`.
fn within(key: &str, value: f64, least: f64, below: Option<f64>) -> Result<()> {
    if value >= least && value < below.unwrap_or(f64::INFINITY) {
        return Ok(());
    }
    Err(Error::invalid(
        format!("router.{key}"),
        match below {
            Some(below) => format!("a number from {least} to below {below}"),
            None => format!("a number from {least} up"),
        },
        value.to_string(),
        format!("change it with --set router.{key}=…"),
    ))
}

/// Refuses weights that sum to 1 over the chosen experts where one is chosen.
fn learns_renormalized(model: &ModelConfig) -> Result<()> {
    if model.top_k > 1 {
        return Ok(());
    }
    Err(Error::invalid(
        "router.renormalize",
        "model.top_k of 2 or more",
        "1",
        "with one expert the weight is always 1 and the router gets no gradient; set renormalize = false",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(name: &str, settings: &str) -> RouterConfig {
        RouterConfig {
            name: name.into(),
            settings: toml::from_str(settings).unwrap(),
        }
    }

    #[test]
    fn every_router_builds_without_settings_and_resolves_to_itself() {
        for info in ROUTERS {
            let mut first = config(info.name, "");
            resolve(&mut first).unwrap();
            let mut second = first.clone();
            resolve(&mut second).unwrap();
            assert_eq!(first, second);
            assert!(build(&first).is_ok());
        }
    }

    #[test]
    fn every_setting_has_a_line_of_help_and_no_other_has() {
        for info in ROUTERS {
            let mut resolved = config(info.name, "");
            resolve(&mut resolved).unwrap();
            let mut helped: Vec<&str> = info.settings.iter().map(|(key, _)| *key).collect();
            helped.sort_unstable();
            let keys: Vec<&str> = resolved.settings.keys().map(String::as_str).collect();
            assert_eq!(helped, keys, "{}", info.name);
        }
    }

    #[test]
    fn names_are_unique() {
        for (i, a) in ROUTERS.iter().enumerate() {
            assert!(ROUTERS[i + 1..].iter().all(|b| b.name != a.name));
        }
    }

    #[test]
    fn wrong_names_and_settings_name_the_nearest_right_one() {
        let error = |c| build(&c).err().unwrap().to_string();
        assert!(error(config("defualt", "")).contains("did you mean \"default\"?"));
        assert!(error(config("default", "bta = 0.5")).contains("did you mean router.beta?"));
        assert!(error(config("topk", "renormalize = 3")).contains("router"));
    }
}
