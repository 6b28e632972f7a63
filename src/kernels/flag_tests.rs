//! Typed calls pass flags as `bool`; other users of the C interface may pass any integer, which the launchers refuse.

use super::launchers::{self, Launchers};
use std::ffi::c_void;
use std::ptr::null_mut;

/// A launcher, the argument that its error must name, and its error text.
type Answer = (&'static str, &'static str, String);

/// Calls every launcher with each flag set to 2 and all other arguments valid.
fn answers(launchers: &Launchers) -> Vec<Answer> {
    let table = launchers.table();
    let mut room = [0u128; 16];
    let p: *mut f32 = room.as_mut_ptr().cast();
    let (v, i, none): (*mut c_void, *mut i32, _) = (p.cast(), p.cast(), null_mut());
    let wide: *mut f64 = p.cast();
    macro_rules! answer {
        ($launcher:ident($($argument:expr),* $(,)?): $name:literal) => {
            {
                // SAFETY: a refused launch touches no memory.
                let status = unsafe { table.$launcher.unwrap()($($argument),*, none) };
                let said = launchers.check(stringify!($launcher), status);
                (stringify!($launcher), $name, said.unwrap_err().to_string())
            }
        };
    }
    vec![
        answer!(norm_backward(v, p, v, v, v, v, 4, 64, 2, 1e-5): "layernorm"),
        answer!(norm_weight_gradient(p, p, 4, 64, 2): "accumulate"),
        answer!(gradient_scale(v, v, p, 8, 2, 0): "bf16_elements"),
        answer!(gradient_scale(v, v, p, 8, 0, 2): "accumulate"),
        answer!(selected_gates(p, p, i, i, 4, 8, 8, 2, 2): "renormalize"),
        answer!(selected_gates_backward(p, p, p, i, i, 4, 8, 8, 2, 2, 0): "renormalize"),
        answer!(selected_gates_backward(p, p, p, i, i, 4, 8, 8, 2, 0, 2): "through"),
        answer!(router_backward(v, p, p, p, p, p, p, p, v, p, 4, 8, 64, 1, 2): "accumulate"),
        answer!(router_weight_gradient(p, p, 4, 8, 64, 2): "accumulate"),
        answer!(adamw_update(v.cast(), i, v.cast(), 8, 2): "bf16_moments"),
        answer!(losses_add(wide, p, p, p, 1.0, 2): "first"),
        answer!(layer_tally(wide, wide, i, p, i, i, i, p, wide, 4, 0, 0, 8, 2, 0, 0, 0): "trains"),
        answer!(layer_tally(wide, wide, i, p, i, i, i, p, wide, 4, 0, 0, 8, 0, 2, 0, 0): "first_of_stats"),
        answer!(layer_tally(wide, wide, i, p, i, i, i, p, wide, 4, 0, 0, 8, 0, 0, 2, 0): "first_of_step"),
        answer!(layer_tally(wide, wide, i, p, i, i, i, p, wide, 4, 0, 0, 8, 0, 0, 0, 2): "over_step"),
        answer!(sum_parts(p, p, 2, 8, 2): "accumulate"),
        answer!(grouped_gemm_weight_gradient(p, v, v, i, i, none.cast(), 4, 4, 4, 2, 16, 8, 2, 0): "accumulate"),
        answer!(embedding_order(i, i, i, i, i, 4, 8, 0, 2): "whole"),
        answer!(embedding_gradient(p, p, v, i, i, 4, 8, 64, 2): "accumulate"),
        answer!(rope(v, v, p, p, 4, 4, 2, 1, 16, 2): "back"),
        answer!(row_arithmetic(v, v, v, 4, 1, 64, 2): "multiply"),
        answer!(gated_rows_backward(v, v, p, v, p, v, v, 4, 64, 2): "accumulate"),
    ]
}

#[test]
fn a_flag_that_is_neither_0_nor_1_is_named_and_nothing_is_launched() {
    let launchers = launchers::sim().unwrap();
    launchers.take_counters();
    for (launcher, name, text) in answers(launchers) {
        let expected = format!("argument `{name}` is outside what the kernel can do");
        assert!(text.contains(&expected), "{launcher}: {text}");
    }
    assert_eq!(launchers.take_counters().unwrap().launches, 0);
}
