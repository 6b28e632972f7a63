//! Writes the report: all analyses as JSON, each analysis that applies as CSV and SVG, and one page with all of them.

use super::Report;
use crate::error::Result;
use crate::report::files::{json, publish};
use crate::report::page::{Page, create};
use std::path::Path;

/// Writes `analysis.json`, a CSV for each analysis that applies, its figure as SVG, and
/// `report.html` into `folder`.
///
/// # Errors
/// Returns an error when the folder cannot be written.
pub fn write(report: &Report, folder: &Path) -> Result<()> {
    create(folder)?;
    let file = folder.join("analysis.json");
    publish(&file, json(&file, report)?)?;
    let page = Page {
        title: format!("Analyses of a {} model", report.router),
        heading: format!("How the router of a {} model routes", report.router),
        introduction: vec![report.introduction()],
        sections: &report.analyses,
        open_rows: 0,
    };
    page.write(folder)
}
