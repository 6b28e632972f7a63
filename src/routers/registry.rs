//! The routers by name.

use super::{ROUTERS, Router};
use crate::config::RouterConfig;
use crate::error::{Error, Result};
use crate::report::{in_plain_words, nearest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::{PoisonError, RwLock};

/// Routers of other crates.
static REGISTERED: RwLock<Vec<&'static RouterInfo>> = RwLock::new(Vec::new());

/// A router's entry in the registry.
pub struct RouterInfo {
    /// Name in configurations and on the command line.
    pub name: &'static str,
    /// Description on one line.
    pub summary: &'static str,
    /// Source: paper or code.
    pub source: &'static str,
    /// Cost compared with `topk`.
    pub cost: &'static str,
    /// Name and description of each setting.
    pub settings: &'static [(&'static str, &'static str)],
    /// How its gradient is checked.
    pub check: GradientCheck,
    pub(super) build: Build,
}

/// How the gradient of a router is checked.
#[derive(Clone, Copy)]
pub struct GradientCheck {
    /// Whether the gradient is the derivative of the forward pass. If not, the gradients of x and of the router's
    /// weight are checked only by comparing devices.
    pub exact: bool,
    /// Whether the gradient is exact when every expert is chosen. A complete model is then checked with K = E.
    pub exact_for_all_experts: bool,
    /// Settings under which every term of the loss is large enough to be checked.
    pub set: &'static [&'static str],
    /// Builds a router whose exact gradient equals the gradient estimate of this router.
    pub surrogate: Option<Surrogate>,
}

/// Builds a surrogate from the router's configuration.
pub type Surrogate = fn(&RouterConfig) -> Result<Box<dyn Router>>;

impl GradientCheck {
    /// The gradient is the derivative of the forward pass.
    pub const EXACT: GradientCheck = GradientCheck {
        exact: true,
        exact_for_all_experts: false,
        set: &[],
        surrogate: None,
    };
}

/// A function that reads settings and returns the router, and the settings with all defaults filled in.
type Build = fn(&toml::Table) -> Result<(Box<dyn Router>, toml::Table)>;

impl RouterInfo {
    /// Creates the entry of a router without settings. You may change its fields before you register it.
    pub const fn new<R: Router + Default + 'static>(
        name: &'static str,
        summary: &'static str,
    ) -> Self {
        RouterInfo {
            name,
            summary,
            source: "another crate",
            cost: "see its source",
            settings: &[],
            check: GradientCheck::EXACT,
            build: without_settings::<R>,
        }
    }

    /// Creates the entry of a router whose fields are its settings.
    pub const fn with_settings<R>(name: &'static str, summary: &'static str) -> Self
    where
        R: Router + Default + Serialize + DeserializeOwned + 'static,
    {
        RouterInfo {
            build: from_settings::<R>,
            ..Self::new::<R>(name, summary)
        }
    }
}

/// Makes a router known by name to configurations, commands and checkpoints of this process.
///
/// ```
/// use routegrad::routers::{self, RouterInfo, topk::TopK};
///
/// # fn main() -> routegrad::error::Result<()> {
/// routers::register(RouterInfo::with_settings::<TopK>("topk-again", "topk under another name"))?;
/// assert!(routers::register(RouterInfo::new::<TopK>("topk", "a name that is taken")).is_err());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Returns an error when the name is taken, or is not of lower-case letters, digits, `-` and `_`.
pub fn register(info: RouterInfo) -> Result<()> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    if info.name.is_empty() || !info.name.chars().all(allowed) {
        return Err(Error::invalid(
            "routers::register",
            "a name of lower-case letters, digits, - and _",
            format!("{:?}", info.name),
            "choose another name",
        ));
    }
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    if named(ROUTERS.iter().chain(registered.iter().copied()), info.name).is_some() {
        return Err(Error::invalid(
            "routers::register",
            "a name that no router has",
            format!("{:?}", info.name),
            "choose another name; `routegrad routers` lists those in use",
        ));
    }
    registered.push(Box::leak(Box::new(info)));
    Ok(())
}

/// Returns every router: those of this crate, then the registered ones.
pub fn all() -> Vec<&'static RouterInfo> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    ROUTERS.iter().chain(registered.iter().copied()).collect()
}

/// Builds the router that a configuration names.
///
/// # Errors
/// Returns an error when there is no such router, or it does not have or accept a setting. The error suggests the
/// nearest valid name.
pub fn build(config: &RouterConfig) -> Result<Box<dyn Router>> {
    Ok((find(&config.name)?.build)(&config.settings)?.0)
}

/// Checks a router's configuration and fills in its defaults.
///
/// # Errors
/// The same errors as [`build`].
pub fn resolve(config: &mut RouterConfig) -> Result<()> {
    config.settings = (find(&config.name)?.build)(&config.settings)?.1;
    Ok(())
}

fn named(
    mut routers: impl Iterator<Item = &'static RouterInfo>,
    name: &str,
) -> Option<&'static RouterInfo> {
    routers.find(|r| r.name == name)
}

/// Returns the entry of the router with this name.
///
/// # Errors
/// Returns an error when there is no router with this name.
pub fn find(name: &str) -> Result<&'static RouterInfo> {
    let routers = all();
    named(routers.iter().copied(), name).ok_or_else(|| {
        let names: Vec<&str> = routers.iter().map(|r| r.name).collect();
        let close = nearest(name, names.iter().copied());
        Error::usage(
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
pub(super) fn from_settings<R>(settings: &toml::Table) -> Result<(Box<dyn Router>, toml::Table)>
where
    R: Router + Default + Serialize + DeserializeOwned + 'static,
{
    let table = |router: &R| match toml::Table::try_from(router) {
        Ok(table) => table,
        Err(e) => unreachable!("settings are plain values: {e}"),
    };
    refuse_unknown(settings, &table(&R::default()))?;
    let read = |settings: toml::Table| settings.try_into::<R>();
    let router = read(settings.clone()).map_err(|e| {
        // Parsing the settings one at a time shows which of them is wrong.
        let alone = settings.iter().find_map(|(key, value)| {
            let one = toml::Table::from_iter([(key.clone(), value.clone())]);
            Some((key, value, read(one).err()?))
        });
        match alone {
            Some((key, value, e)) => Error::usage(
                format!("router.{key}"),
                expected(&e),
                value.to_string(),
                "see `routegrad routers`",
            ),
            None => Error::usage(
                "router",
                "settings",
                e.to_string(),
                "see `routegrad routers`",
            ),
        }
    })?;
    let resolved = table(&router);
    Ok((Box::new(router), resolved))
}

/// Returns the expected kind of value, from the error of the parser.
fn expected(e: &toml::de::Error) -> String {
    let message = e.message().lines().next().unwrap_or_default();
    let expected = message.rsplit_once("expected ");
    in_plain_words(expected.map_or(message, |(_, expected)| expected))
}

/// [`RouterInfo::build`] for a router without settings.
fn without_settings<R: Router + Default + 'static>(
    settings: &toml::Table,
) -> Result<(Box<dyn Router>, toml::Table)> {
    refuse_unknown(settings, &toml::Table::new())?;
    Ok((Box::new(R::default()), toml::Table::new()))
}

/// Rejects settings that are not in `known`.
fn refuse_unknown(settings: &toml::Table, known: &toml::Table) -> Result<()> {
    let Some(key) = settings.keys().find(|k| !known.contains_key(*k)) else {
        return Ok(());
    };
    let keys: Vec<&str> = known.keys().map(String::as_str).collect();
    let close = nearest(key, keys.iter().copied());
    let owners = ROUTERS
        .iter()
        .filter(|info| info.settings.iter().any(|(own, _)| own == key));
    let owners: Vec<&str> = owners.map(|info| info.name).collect();
    Err(Error::usage(
        format!("router.{key}"),
        if keys.is_empty() {
            "no settings for this router".into()
        } else {
            format!("one of the settings {}", keys.join(", "))
        },
        format!("\"{key}\""),
        match (owners.as_slice(), close) {
            ([_, ..], _) => format!("it is a setting of {}", owners.join(", ")),
            (_, Some(close)) => format!("did you mean router.{close}?"),
            _ => "remove it".into(),
        },
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
    fn a_registered_router_is_found_by_name_once() {
        use crate::routers::topk::TopK;
        let info = || RouterInfo::with_settings::<TopK>("registered-in-a-test", "a test's");
        assert!(build(&config("registered-in-a-test", "")).is_err());
        register(info()).unwrap();
        assert!(build(&config("registered-in-a-test", "renormalize = true")).is_ok());
        assert!(all().iter().any(|r| r.name == "registered-in-a-test"));
        let taken = |name| {
            register(RouterInfo::new::<TopK>(name, ""))
                .unwrap_err()
                .to_string()
        };
        assert!(taken("registered-in-a-test").contains("a name that no router has"));
        assert!(taken("topk").contains("a name that no router has"));
        assert!(taken("Two words").contains("lower-case"));
    }

    #[test]
    fn errors_for_wrong_names_and_settings_suggest_the_nearest_valid_one() {
        let error = |c| build(&c).err().unwrap().to_string();
        assert!(error(config("defualt", "")).contains("did you mean \"default\"?"));
        assert!(error(config("default", "bta = 0.5")).contains("did you mean router.beta?"));
        for (router, set, expected) in [
            (
                "topk",
                "renormalize = 3",
                "router.renormalize: expected true or false, got 3",
            ),
            (
                "default",
                "beta = \"high\"",
                "router.beta: expected a number, got \"high\"",
            ),
            (
                "default",
                "samples = -1",
                "router.samples: expected a whole number, 0 or more, got -1",
            ),
            ("default", "source = \"no\"", "router.source: expected `"),
        ] {
            let e = error(config(router, set));
            assert!(e.contains(expected), "{e}");
        }
    }
}
