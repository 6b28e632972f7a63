//! Writes the report: all analyses as JSON, each analysis that applies as CSV and SVG, and one page with all of them.

use super::Report;
use crate::error::{Error, Result};
use crate::report::files::publish;
use crate::report::page::{Page, create, write_files};
use std::path::Path;

/// Writes `analysis.json`, a CSV for each analysis that applies, its figure as SVG, and
/// `report.html` into `folder`.
///
/// # Errors
/// Returns an error when the folder cannot be written.
pub fn write(report: &Report, folder: &Path) -> Result<()> {
    create(folder)?;
    let json = serde_json::to_string_pretty(report).map_err(|e| {
        Error::file(
            folder,
            "values that JSON can hold",
            e.to_string(),
            "report this as a bug",
        )
    })?;
    publish(&folder.join("analysis.json"), json + "\n")?;
    write_files(&report.analyses, folder)?;
    let page = Page {
        title: format!("Analyses of a {} model", report.router),
        heading: format!("How the router of a {} model routes", report.router),
        introduction: vec![report.introduction()],
        sections: &report.analyses,
        open_rows: 0,
    };
    publish(&folder.join("report.html"), page.html())
}
