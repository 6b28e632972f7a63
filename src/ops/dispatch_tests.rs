//! Tests of dispatch against values computed by hand.

use super::*;

#[test]
fn rows_are_sorted_by_expert_then_token_and_the_maps_are_inverse() {
    for (t, e, k, skip) in [
        (1, 1, 1, false),
        (1, 8, 2, true),
        (97, 7, 3, false),
        (64, 4, 4, false),
    ] {
        let d = Dispatch::new(scattered(t, e, k, skip));
        let mut seen = vec![false; d.num_rows()];
        for token in 0..t {
            for slot in d.selection().slots(token) {
                let row = d.row(slot);
                assert!(!std::mem::replace(&mut seen[row], true));
                assert_eq!(d.token(row), token);
                assert!(d.rows(d.selection().expert(slot)).contains(&row));
            }
        }
        assert!(seen.into_iter().all(|s| s));
        for expert in 0..e {
            assert!(d.rows(expert).map(|r| d.token(r)).is_sorted());
        }
    }
}

#[test]
fn a_token_may_choose_no_expert() {
    let s = Selection::new(3, 2, |t, c| c.extend(if t == 1 { vec![] } else { vec![1] })).unwrap();
    let d = Dispatch::new(s);
    assert_eq!((d.rows(0), d.rows(1)), (0..0, 0..2));
    assert_eq!((d.token(0), d.token(1)), (0, 2));
}

#[test]
fn an_expert_out_of_range_or_out_of_order_is_refused() {
    assert!(Selection::new(1, 2, |_, c| c.push(2)).is_err());
    assert!(Selection::new(1, 2, |_, c| c.push(-1)).is_err());
    assert!(Selection::new(1, 2, |_, c| c.extend([1, 0])).is_err());
    assert!(Selection::new(1, 2, |_, c| c.extend([1, 1])).is_err());
}
