//! Checks the optimizer's update of a table of parameters, and the sums of squares of their gradients
//! (`kernels/adamw.cu`), against float64.

use super::numbers::{Errors, F32_ROUNDOFF, Random};
use super::{BOTH, Buffer, Case, Problem, each, exactly, launch_of, pairs, values};
use crate::kernels::adamw::{AdamwUpdate, BLOCK, SquareSums};
use crate::kernels::bindings::{routegrad_parameter, routegrad_step_outcome};
use crate::tensor::random::{Purpose, Stream};
use half::bf16;
use std::ptr::{null, null_mut};
use std::sync::Arc;

/// β₁, β₂, rate, second_scale, ε, keep, scale: the values of a third step with clipping, without and with decay.
const COEFFICIENTS: [[f32; 7]; 2] = [
    [0.9, 0.95, 2.2e-3, 7.01, 1e-8, 1.0, 0.37],
    [0.9, 0.95, 2.2e-3, 7.01, 1e-8, 0.9996, 0.37],
];

/// Number of this step.
const UPDATE: u64 = 3;

/// A parameter and its initial values.
struct Parameter {
    number: usize,
    /// Whether the moments are bf16.
    bf16: bool,
    w: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    gradient: Option<Vec<f32>>,
    split: bool,
    decays: bool,
}

impl Parameter {
    fn new(count: usize, i: usize, bf16: bool) -> Self {
        let mut random = Random((count + 7 * i) as u64);
        let [mut w, m, g, v] = [(); 4].map(|()| random.normals(count));
        let v: Vec<f32> = v.iter().map(|x| x * x).collect();
        let moment = |x: f32| if bf16 { bf16::from_f32(x).to_f32() } else { x };
        let [m, v] = [m, v].map(|x| x.into_iter().map(moment).collect());
        // Numbers whose upper half is a tie, to be rounded up and down.
        for (i, bits) in [0x3f80_8000u32, 0xbf81_8000, 0x3f80_7fff, 0x0000_8000]
            .into_iter()
            .enumerate()
        {
            w[i % count] = f32::from_bits(bits);
        }
        Parameter {
            number: i,
            bf16,
            w,
            m,
            v,
            gradient: (i % 4 != 3).then_some(g),
            split: i % 2 == 0,
            decays: i % 3 == 0,
        }
    }

    /// Returns the upper and the lower halves of w.
    fn halves(&self) -> [Vec<u16>; 2] {
        let upper = |w: &f32| ((w.to_bits().wrapping_add(0x8000)) >> 16) as u16;
        let lower = |w: &f32| (w.to_bits().wrapping_sub(u32::from(upper(w)) << 16)) as u16;
        [
            self.w.iter().map(upper).collect(),
            self.w.iter().map(lower).collect(),
        ]
    }
}

/// Buffers: four per parameter (value or its halves, moments, gradient), the table, the parameters of the blocks.
struct Table {
    parameters: Vec<Parameter>,
}

impl Table {
    fn new(counts: &[usize], bf16: bool) -> Self {
        let parameters = counts.iter().enumerate();
        let parameters = parameters.map(|(i, n)| Parameter::new(*n, i, bf16));
        Table {
            parameters: parameters.collect(),
        }
    }

    fn buffers(self: &Arc<Self>, changed: bool) -> Vec<Buffer> {
        let mut buffers = Vec::new();
        for p in &self.parameters {
            let [upper, lower] = p.halves();
            let values: Vec<u32> = match p.split {
                // Both halves are in one buffer; the lower half follows the upper one at a multiple of 16 bytes.
                true => {
                    let mut both = upper;
                    both.resize(lower_half(p.w.len()), 0);
                    both.extend(lower);
                    both.resize(both.len().next_multiple_of(2), 0);
                    both.chunks(2)
                        .map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16)
                        .collect()
                }
                false => p.w.iter().map(|w| w.to_bits()).collect(),
            };
            if changed {
                buffers.push(Buffer::changed("w", &values));
                for (name, moment) in [("m", &p.m), ("v", &p.v)] {
                    let bits = moment.iter().map(|x| bf16::from_f32(*x).to_bits());
                    buffers.push(match p.bf16 {
                        true => Buffer::changed(name, &bits.collect::<Vec<u16>>()),
                        false => Buffer::changed(name, moment),
                    });
                }
            }
            buffers.push(Buffer::input(
                "gradient",
                p.gradient.as_deref().unwrap_or(&[0.0]),
            ));
        }
        let blocks: Vec<i32> = (0..)
            .zip(&self.parameters)
            .flat_map(|(i, p)| std::iter::repeat_n(i, p.w.len().div_ceil(BLOCK)))
            .collect();
        let table = self.clone();
        buffers.push(Buffer::table(
            "parameters",
            self.parameters.len(),
            move |addresses| table.rows(addresses, changed),
        ));
        buffers.push(Buffer::input("block_parameter", &blocks));
        buffers
    }

    fn rows(&self, addresses: &[*mut u8], changed: bool) -> Vec<routegrad_parameter> {
        let mut first_block = 0;
        let each = addresses.chunks(if changed { 4 } else { 1 });
        let rows = self.parameters.iter().zip(each).map(|(p, own)| {
            let (value, moments) = match changed {
                true => (own[0], [own[1], own[2]]),
                false => (null_mut(), [null_mut(); 2]),
            };
            // Each half has 16 bits.
            let lower = value.wrapping_add(2 * lower_half(p.w.len()));
            let [whole, upper, lower] = match p.split {
                true => [null_mut(), value, lower],
                false => [value, null_mut(), null_mut()],
            };
            let row = routegrad_parameter {
                whole: whole.cast(),
                upper: upper.cast(),
                lower: lower.cast(),
                first: moments[0].cast(),
                second: moments[1].cast(),
                gradient: match p.gradient {
                    Some(_) => own[own.len() - 1].cast(),
                    None => null(),
                },
                elements: p.w.len() as i64,
                first_block,
                decays: p.decays.into(),
                reserved: 0,
            };
            first_block += p.w.len().div_ceil(BLOCK) as i64;
            row
        });
        rows.collect()
    }

    fn blocks(&self) -> usize {
        let blocks = self.parameters.iter().map(|p| p.w.len().div_ceil(BLOCK));
        blocks.sum()
    }
}

/// Returns the position, in elements, at which the lower half begins.
fn lower_half(count: usize) -> usize {
    count.next_multiple_of(8)
}

fn outcome(accepted: bool) -> routegrad_step_outcome {
    routegrad_step_outcome {
        accepted: accepted.into(),
        updates: UPDATE,
        coefficients: COEFFICIENTS,
        ..Default::default()
    }
}

fn update(counts: &[usize], accepted: bool, bf16: bool) -> Problem {
    let table = Arc::new(Table::new(counts, bf16));
    let mut buffers = table.buffers(true);
    buffers.push(Buffer::table("outcome", 1, move |_| {
        vec![outcome(accepted)]
    }));
    let blocks = table.blocks();
    Problem {
        label: format!(
            "N {counts:?}{}{}",
            if bf16 { ", bf16 moments" } else { "" },
            if accepted { "" } else { ", refused" }
        ),
        buffers,
        launch: launch_of!(AdamwUpdate {
            parameters, block_parameter, outcome;
            blocks, bf16_moments: bf16,
        }),
        judge: Box::new(move |out| {
            let mut errors = Errors::default();
            for (p, out) in table.parameters.iter().zip(out.chunks(3)) {
                p.judge(out, accepted, &mut errors)?;
            }
            Ok(errors)
        }),
    }
}

impl Parameter {
    fn moments(&self, bytes: &[u8]) -> Vec<f32> {
        if !self.bf16 {
            return values(bytes);
        }
        let bits = values::<u16>(bytes).into_iter();
        bits.map(|bits| bf16::from_bits(bits).to_f32()).collect()
    }

    /// Returns the value that the buffer holds.
    fn value(&self, bytes: &[u8]) -> Vec<f32> {
        if !self.split {
            return values(bytes);
        }
        let halves: Vec<u16> = values(bytes);
        let lower = &halves[lower_half(self.w.len())..];
        let joined = halves.iter().zip(lower).map(|(&u, &l)| {
            let bits = (u32::from(u) << 16).wrapping_add_signed(i32::from(l as i16));
            f32::from_bits(bits)
        });
        joined.take(self.w.len()).collect()
    }

    fn judge(&self, out: &[Vec<u8>], accepted: bool, errors: &mut Errors) -> Result<(), String> {
        let [m, v] = [&out[1], &out[2]].map(|bytes| self.moments(bytes));
        let w = self.value(&out[0]);
        let draws = Stream::new(0, Purpose::Rounding, UPDATE, self.number);
        let [beta1, beta2, rate, second_scale, eps, keep, scale] =
            COEFFICIENTS[usize::from(self.decays)].map(f64::from);
        // 1 − β is rounded to f32 here too, as in the kernel.
        let [more1, more2] = [COEFFICIENTS[0][0], COEFFICIENTS[0][1]].map(|b| f64::from(1.0 - b));
        for i in 0..self.w.len() {
            let mut judge = |what: &str, got: f32, want: f64, size: f64| {
                let place = || format!("{what} {i} of {}", self.w.len());
                errors.add(f64::from(got), want, size * F32_ROUNDOFF + 1e-44, place)
            };
            if !accepted {
                for (what, got, old) in [("m", m[i], self.m[i]), ("v", v[i], self.v[i])] {
                    judge(what, got, old.into(), 0.0)?;
                }
                judge("w", w[i], self.w[i].into(), 0.0)?;
                continue;
            }
            let g = self.gradient.as_ref().map_or(0.0, |g| f64::from(g[i])) * scale;
            let (a, b) = (beta1 * f64::from(self.m[i]), more1 * g);
            let second = beta2 * f64::from(self.v[i]) + more2 * g * g;
            let divisor = (second * second_scale).sqrt() + eps;
            let kept = keep * f64::from(self.w[i]);
            let terms = rate * (a.abs() + b.abs()) / divisor;
            let draw = draws.bits((i / 1024 * 256 + i % 256) as u64)[i / 256 % 4];
            for (what, got, want, size, random) in [
                ("m", m[i], a + b, 4.0 * (a.abs() + b.abs()), draw & 0xffff),
                ("v", v[i], second, 6.0 * second, draw >> 16),
            ] {
                if !self.bf16 {
                    judge(what, got, want, size)?;
                    continue;
                }
                // The value before rounding is within roundoff of `want`, and rounding is monotonic.
                let error = size * F32_ROUNDOFF + 1e-44;
                let ends = [want - error, want + error].map(|x| {
                    let bits = (x as f32).to_bits().wrapping_add(random);
                    f64::from(f32::from_bits(bits & 0xffff_0000))
                });
                let nearest = f64::from(got).clamp(ends[0], ends[1]);
                judge(what, got, nearest, 0.0)?;
            }
            let want = kept - rate * (a + b) / divisor;
            judge("w", w[i], want, 3.0 * kept.abs() + 14.0 * terms)?;
            if self.split {
                let upper: u16 = values(&out[0])[i];
                let nearest = ((w[i].to_bits() + 0x8000) >> 16) as u16;
                exactly::<u16>("upper half", &upper.to_ne_bytes(), |_| nearest)?;
            }
        }
        Ok(())
    }
}

fn squares(counts: &[usize]) -> Problem {
    let table = Arc::new(Table::new(counts, false));
    let blocks = table.blocks();
    let mut buffers = table.buffers(false);
    buffers.push(Buffer::output("parts", blocks * 8));
    Problem {
        label: format!("N {counts:?}"),
        buffers,
        launch: launch_of!(SquareSums { parts, parameters, block_parameter; blocks }),
        judge: Box::new(move |out| {
            let mut errors = Errors::default();
            let mut parts = values::<f64>(&out[0]).into_iter();
            for p in &table.parameters {
                let zeros = vec![0.0; p.w.len()];
                for g in p.gradient.as_ref().unwrap_or(&zeros).chunks(BLOCK) {
                    let want: f64 = g.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
                    let got = parts.next().ok_or("too few parts")?;
                    errors.add(got, want, 1e-12 * want, || "a part".into())?;
                }
            }
            Ok(errors)
        }),
    }
}

/// Returns the cases of the kernels in this file.
pub fn cases() -> Vec<Case> {
    const COUNTS: [&[usize]; 3] = [&[1], &[5, 2048, 8192, 3], &[20_011, 7, 8193, 64, 300]];
    let mut updates = each(pairs(BOTH, COUNTS), |(bf16, counts)| {
        update(counts, true, bf16)
    });
    updates.extend(each(BOTH, |bf16| update(COUNTS[1], false, bf16)));
    vec![
        Case::small("adamw_update", "adamw", updates),
        Case::small("square_sums", "adamw", each(COUNTS, squares)),
    ]
}
