//! The GPUs and drivers with which the kernels of a build run.

/// Lowest compute capability that has all instructions of the kernels for GPUs without wgmma: that of Ampere.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);
/// The architectures for which kernels can be compiled (`ARCHS` of `build/cuda.rs`).
const ARCHS: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];

/// Returns the architectures for which this build's kernels were compiled, in the order of `ROUTEGRAD_ARCHS`.
pub fn built_for() -> impl Iterator<Item = &'static str> {
    let list = option_env!("ROUTEGRAD_BUILT_FOR").unwrap_or_default();
    list.split(',').filter(|arch| !arch.is_empty())
}

/// Returns the CUDA version that a driver must support to load this build's kernels; (0, 0) in a build without nvcc. It is
/// the first version with the major number of nvcc, because a driver runs the machine code of all versions with its major
/// number.
pub fn driver_of_kernels() -> (i32, i32) {
    let release = option_env!("ROUTEGRAD_BUILT_WITH").unwrap_or_default();
    let major = release.split('.').next().and_then(|n| n.parse().ok());
    (major.unwrap_or(0), 0)
}

/// Checks that a driver that supports the CUDA version `got` is one for the version `needed`, or a later one.
///
/// # Errors
/// Returns one sentence that says what is required.
pub fn require_driver(got: (i32, i32), needed: (i32, i32)) -> Result<(), String> {
    if got >= needed {
        return Ok(());
    }
    let (major, minor) = needed;
    let driver = match needed {
        (12, 0) => " (driver 525)",
        (13, 0) => " (driver 580)",
        _ => "",
    };
    Err(format!(
        "the CUDA driver is too old: it supports CUDA {}.{}, the kernels need {major}.{minor}{driver}",
        got.0, got.1
    ))
}

/// Returns the (major, minor) of a CUDA version as the driver gives it, 1000 · major + 10 · minor.
pub fn cuda_version(number: i32) -> (i32, i32) {
    (number / 1000, number % 1000 / 10)
}

/// Returns the architectures of [`built_for`] as numbers: 10 · major + minor of the compute capability.
pub fn architectures() -> impl Iterator<Item = i32> {
    let number = |arch: &str| arch.trim_end_matches('a').parse().ok();
    ARCHS.into_iter().filter_map(number)
}

/// Returns whether code for `arch` runs on a GPU of this compute capability. `arch` must be of the GPU's generation
/// and not newer than the GPU; code for 90a runs only on 9.0.
fn runs(arch: &str, (major, minor): (i32, i32)) -> bool {
    let found = 10 * major + minor;
    match arch.strip_suffix('a').unwrap_or(arch).parse::<i32>() {
        Ok(number) if arch.ends_with('a') => number == found,
        Ok(number) => number / 10 == major && number <= found,
        Err(_) => false,
    }
}

/// Checks that the kernels, compiled for `built_for`, run on a GPU.
///
/// # Errors
/// Returns one sentence that says what is required.
pub fn require_capability<'a>(
    name: &str,
    got: (i32, i32),
    built_for: impl Iterator<Item = &'a str>,
) -> Result<(), String> {
    let (major, minor) = got;
    let has = format!("{name} has compute capability {major}.{minor}");
    if got < OLDEST_CAPABILITY {
        let (major, minor) = OLDEST_CAPABILITY;
        return Err(format!(
            "{has}; the kernels need {major}.{minor} or newer: Ampere, Ada, Hopper, Blackwell"
        ));
    }
    let built_for: Vec<&str> = built_for.collect();
    if built_for.iter().any(|arch| runs(arch, got)) {
        return Ok(());
    }
    let built_for = built_for.join(", ");
    Err(match ARCHS.iter().rev().find(|arch| runs(arch, got)) {
        Some(arch) => format!(
            "{has}, but the kernels are compiled for {built_for}: build again with ROUTEGRAD_ARCHS={arch}"
        ),
        None => format!(
            "{has}, for which there are no kernels: there are kernels for {}",
            ARCHS.join(", ")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_driver_is_refused_with_what_is_needed() {
        let refused = |got, needed| require_driver(cuda_version(got), needed).unwrap_err();
        assert_eq!(
            refused(12090, (13, 0)),
            "the CUDA driver is too old: it supports CUDA 12.9, the kernels need 13.0 (driver 580)"
        );
        assert!(refused(11080, (12, 0)).ends_with("CUDA 11.8, the kernels need 12.0 (driver 525)"));
        for (got, needed) in [(13000, (13, 0)), (13020, (13, 0)), (12000, (12, 0))] {
            assert!(require_driver(cuda_version(got), needed).is_ok());
        }
    }

    #[test]
    fn kernels_need_a_driver_of_the_compilers_major_version() {
        let (major, minor) = driver_of_kernels();
        assert_eq!((major >= 12, minor), (cfg!(routegrad_cuda), 0));
    }

    #[test]
    fn another_architecture_is_refused_with_what_is_needed() {
        let refused = |name, got, built: &[&'static str]| {
            require_capability(name, got, built.iter().copied()).unwrap_err()
        };
        for (name, got) in [("Tesla V100", (7, 0)), ("Tesla T4", (7, 5))] {
            let why = refused(name, got, &ARCHS);
            let (major, minor) = got;
            let has =
                format!("{name} has compute capability {major}.{minor}; the kernels need 8.0");
            assert!(why.contains(&has), "{why}");
        }
        let why = refused("NVIDIA GeForce RTX 4070", (8, 9), &["90a"]);
        assert!(
            why.contains("compiled for 90a: build again with ROUTEGRAD_ARCHS=89"),
            "{why}"
        );
        assert!(refused("NVIDIA H200", (9, 0), &["80", "89"]).contains("ROUTEGRAD_ARCHS=90a"));
        assert!(refused("NVIDIA A100", (8, 0), &["86"]).contains("ROUTEGRAD_ARCHS=80"));
        assert!(refused("NVIDIA Thor", (11, 0), &ARCHS).contains("there are no kernels"));
    }

    #[test]
    fn every_gpu_from_ampere_on_runs_what_is_compiled_for_its_generation() {
        for (got, built_for) in [
            ((8, 0), "80"),
            ((8, 6), "80"),
            ((8, 6), "86"),
            ((8, 9), "86"),
            ((9, 0), "90a"),
            ((9, 0), "90"),
            ((10, 0), "100"),
            ((10, 3), "100"),
            ((12, 0), "120"),
            ((12, 1), "120"),
        ] {
            let found = require_capability("GPU", got, [built_for].into_iter());
            assert!(found.is_ok(), "{got:?} {built_for}: {found:?}");
        }
    }
}
