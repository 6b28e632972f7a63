//! The report: each analysis as a table (JSON and CSV) and all of them as one page that needs no
//! other file.

use super::{Analysis, Report};
use crate::error::{Error, Result};
use crate::plots::publish;
use serde::Serialize;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// One cell of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cell {
    Count(u64),
    Text(String),
    /// None where the value is not defined.
    Number(Option<f64>),
}

impl From<usize> for Cell {
    fn from(n: usize) -> Self {
        Cell::Count(n as u64)
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Cell::Text(text.into())
    }
}

impl From<Option<f64>> for Cell {
    fn from(x: Option<f64>) -> Self {
        Cell::Number(x.filter(|x| x.is_finite()))
    }
}

impl From<f64> for Cell {
    fn from(x: f64) -> Self {
        Some(x).into()
    }
}

impl Cell {
    fn csv(&self) -> String {
        match self {
            Cell::Count(n) => n.to_string(),
            Cell::Number(x) => x.map_or(String::new(), |x| x.to_string()),
            Cell::Text(text) if text.contains(['"', ',', '\n', '\r']) => {
                format!("\"{}\"", text.replace('"', "\"\""))
            }
            Cell::Text(text) => text.clone(),
        }
    }

    fn html(&self) -> String {
        match self {
            Cell::Number(x) => x.map_or("–".into(), |x| format!("{x:.4}")),
            Cell::Text(text) => escaped(text),
            Cell::Count(n) => n.to_string(),
        }
    }
}

/// A table, one observation a row.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    pub columns: Vec<&'static str>,
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    pub fn new(columns: &[&'static str]) -> Self {
        Table {
            columns: columns.to_vec(),
            rows: Vec::new(),
        }
    }

    fn csv(&self) -> String {
        let mut text = self.columns.join(",") + "\n";
        for row in &self.rows {
            let cells: Vec<String> = row.iter().map(Cell::csv).collect();
            text.push_str(&cells.join(","));
            text.push('\n');
        }
        text
    }
}

/// Writes `analysis.json`, a CSV for each analysis that applies, its figure as SVG, and
/// `report.html` into `folder`.
///
/// # Errors
/// When the folder cannot be written.
pub fn write(report: &Report, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let json = serde_json::to_string_pretty(report).map_err(|e| {
        Error::file(
            folder,
            "values that JSON can hold",
            e.to_string(),
            "report this as a bug",
        )
    })?;
    publish(&folder.join("analysis.json"), &(json + "\n"))?;
    for analysis in report.analyses.iter().filter(|a| !a.table.rows.is_empty()) {
        let file = |ending: &str| folder.join(format!("{}.{ending}", analysis.name));
        publish(&file("csv"), &analysis.table.csv())?;
        if let Some(figure) = &analysis.figure {
            publish(&file("svg"), figure)?;
        }
    }
    publish(&folder.join("report.html"), &html(report))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

const STYLE: &str = "\
body { font: 16px/1.5 sans-serif; color: #333; max-width: 72em; margin: 2em auto; padding: 0 1em }
svg { max-width: 100%; height: auto }
code { background: #f3f3f3; padding: 0 .3em }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .1em .8em; text-align: right; border-bottom: 1px solid #e6e6e6 }
.note { color: #8a3b00 }";

fn html(report: &Report) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>Analyses of a {} model</title>\n\
         <style>\n{STYLE}\n</style>\n<h1>How the router of a {} model routes</h1>\n<p>{}</p>\n",
        escaped(&report.router),
        escaped(&report.router),
        escaped(&report.introduction()),
    );
    for (i, analysis) in report.analyses.iter().enumerate() {
        section(&mut page, i + 1, analysis);
    }
    page.push_str("</html>\n");
    page
}

fn section(page: &mut String, number: usize, analysis: &Analysis) {
    let _ = write!(
        page,
        "<h2 id=\"{}\">{number}. {}</h2>\n<p>{}</p>\n<p><code>{}</code></p>\n",
        analysis.name,
        escaped(analysis.title),
        escaped(analysis.shows),
        escaped(analysis.formula),
    );
    for note in &analysis.notes {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", escaped(note));
    }
    if let Some(figure) = &analysis.figure {
        let _ = writeln!(page, "<figure>{figure}</figure>");
    }
    if analysis.table.rows.is_empty() {
        return;
    }
    let _ = write!(
        page,
        "<details><summary>The numbers</summary>\n<table>\n<tr>"
    );
    for column in &analysis.table.columns {
        let _ = write!(page, "<th>{}</th>", escaped(column));
    }
    page.push_str("</tr>\n");
    for row in &analysis.table.rows {
        page.push_str("<tr>");
        for cell in row {
            let _ = write!(page, "<td>{}</td>", cell.html());
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n</details>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_becomes_csv_with_quotes_only_where_needed() {
        let mut table = Table::new(&["source", "count", "share"]);
        table
            .rows
            .push(vec!["a, \"b\"".into(), 3usize.into(), 0.25.into()]);
        table
            .rows
            .push(vec!["c".into(), 0usize.into(), f64::NAN.into()]);
        assert_eq!(
            table.csv(),
            "source,count,share\n\"a, \"\"b\"\"\",3,0.25\nc,0,\n"
        );
    }

    #[test]
    fn names_cannot_break_the_page() {
        assert_eq!(escaped("<b> & \"c\""), "&lt;b&gt; &amp; &quot;c&quot;");
    }
}
