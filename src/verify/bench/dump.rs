//! Writes our results for the shared inputs to a file, with which other implementations are compared.

use super::case::Work;
use super::{Options, groups, kernels, timed};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::study::exchange::tensors::write;
use crate::tensor::dtype::DType;
use crate::train::checkpoint::{Array, Content};
use crate::verify::kernels::{Run, Simulator};
use std::path::Path;

/// Writes the outputs of every selected group, after one run, as flat f32 arrays "WORK GROUP/OUTPUT". Returns their
/// number.
///
/// # Errors
/// When a group fails, no group is selected, or the file cannot be written.
pub fn dump(options: &Options, file: &Path) -> Result<usize> {
    let device = options.device.unwrap_or(Device::Sim);
    if device == Device::Cuda {
        let help = "hardware-check compares the kernels on a GPU with float64";
        return Err(Error::usage(
            "bench --dump",
            "device cpu or sim",
            "cuda",
            help,
        ));
    }
    device.prepare()?;
    let machine = Simulator::new()?;
    let mut arrays = Vec::new();
    let mut add = |name: String, numbers: &[f32]| {
        arrays.push(Array {
            name,
            shape: [numbers.len()].into(),
            dtype: DType::F32,
            content: Content::Bytes(bytemuck::cast_slice(numbers).to_vec()),
        });
    };
    for group in groups(options, device)? {
        match &group.work {
            Work::Step(_) => {}
            Work::Operation(operation) => {
                for (output, numbers) in operation.build(&group.name)?.outputs()? {
                    add(format!("operation {}/{output}", operation.name()), &numbers);
                }
            }
            _ => {
                let Some(kernels) = kernels::build(&machine, &group)? else {
                    continue;
                };
                let run = Run::new(&machine, &kernels.whole)?;
                run.launch()?;
                let work = group.sizes()?;
                let work = work["work"].as_str().unwrap_or_default();
                for (output, dtype) in &kernels.outputs {
                    let bytes = run.content(output, usize::MAX)?;
                    add(
                        format!("{work} {}/{output}", group.name),
                        &timed::numbers(&bytes, *dtype),
                    );
                }
            }
        }
    }
    if arrays.is_empty() {
        let help = "routegrad bench --list shows their names; steps have no outputs";
        return Err(Error::usage(
            "bench --dump",
            "cases of the filter",
            "none",
            help,
        ));
    }
    write(file, &arrays)?;
    Ok(arrays.len())
}
