//! Matrix products through cuBLASLt, loaded at run time: one strided batch of products of equal size.

use super::cuda::{DeviceMemory, Gpu};
use crate::error::{Error, Result};
use cudarc::cublaslt::{result, sys};
use std::ffi::c_void;

/// Bytes of workspace: the size that cuBLASLt recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// A handle with its workspace.
pub struct Cublas {
    handle: sys::cublasLtHandle_t,
    workspace: DeviceMemory,
}

impl Cublas {
    /// # Errors
    /// Returns one sentence when the library is missing or does not start.
    pub fn open(gpu: &Gpu) -> Result<Self, String> {
        // SAFETY: the function only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            return Err("libcublasLt.so.13 cannot be loaded".into());
        }
        let workspace = gpu.allocate(WORKSPACE).map_err(|e| e.to_string())?;
        let handle =
            result::create_handle().map_err(|e| format!("cublasLtCreate answers {:?}", e.0))?;
        Ok(Self { handle, workspace })
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A batch of products at one shape, with the algorithm that cuBLASLt recommends.
pub struct Matmul {
    handle: sys::cublasLtHandle_t,
    description: sys::cublasLtMatmulDesc_t,
    /// Layouts of cuBLAS's A, B and result.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

/// A matrix of a batch, column-major.
#[derive(Clone, Copy)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    /// Whether the matrix is transposed in the product.
    pub transposed: bool,
    /// Whether the elements are f32; otherwise they are bf16.
    pub f32: bool,
}

/// `result = a b` for each product of a batch.
#[derive(Clone, Copy)]
pub struct Batch {
    pub a: Matrix,
    pub b: Matrix,
    pub result: Matrix,
    pub products: usize,
}

impl Matmul {
    /// Creates a batch and runs it once on these buffers, see [`launch`](Self::launch). The library then does its
    /// initialisation, which may not be permitted while a graph is captured.
    ///
    /// # Errors
    /// The same errors as [`new`](Self::new), and when the product does not run.
    pub fn started(
        gpu: &Gpu,
        batch: Batch,
        pointers: &[*mut u8],
    ) -> Result<(Self, Cublas), String> {
        let cublas = Cublas::open(gpu)?;
        let matmul = Self::new(&cublas, batch)?;
        let done = matmul.launch(gpu, pointers).and_then(|()| gpu.finish());
        done.map_err(|e| e.to_string())?;
        Ok((matmul, cublas))
    }

    /// # Errors
    /// Returns one sentence when cuBLASLt has no algorithm.
    pub fn new(cublas: &Cublas, batch: Batch) -> Result<Self, String> {
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        let refused = |e: result::CublasError| format!("cuBLASLt answers {:?}", e.0);
        let description =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)
                .map_err(refused)?;
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB,
        };
        for (attribute, transposed) in [
            (CUBLASLT_MATMUL_DESC_TRANSA, batch.a.transposed),
            (CUBLASLT_MATMUL_DESC_TRANSB, batch.b.transposed),
        ] {
            let value = i32::from(transposed); // cublasOperation_t: 0 as it is, 1 transposed
            // SAFETY: the attribute is a 32-bit enum.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    attribute,
                    (&raw const value).cast(),
                    size_of::<i32>(),
                )
            }
            .map_err(refused)?;
        }
        let mut layouts = [std::ptr::null_mut(); 3];
        for (layout, matrix) in layouts.iter_mut().zip([batch.a, batch.b, batch.result]) {
            *layout = strided(matrix, batch.products).map_err(refused)?;
        }
        let algorithm = choose(cublas.handle, description, layouts).map_err(refused)?;
        let workspace = cublas.workspace.address();
        Ok(Self {
            handle: cublas.handle,
            description,
            layouts,
            algorithm,
            workspace,
        })
    }

    /// Launches the products on the GPU's stream. `buffers` are result, b, a, in this order.
    ///
    /// # Errors
    /// Returns an error when cuBLASLt refuses.
    pub fn launch(&self, gpu: &Gpu, buffers: &[*mut u8]) -> Result<()> {
        let (one, zero) = (1.0f32, 0.0f32);
        let [a, b] = [buffers[2], buffers[1]].map(|operand| operand.cast_const().cast::<c_void>());
        let (out, [layout_a, layout_b, layout_out]) = (buffers[0].cast::<c_void>(), self.layouts);
        // SAFETY: the buffers have the shapes of the layouts; the scalars are read before it returns.
        let launched = unsafe {
            result::matmul(
                self.handle,
                self.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                a,
                layout_a,
                b,
                layout_b,
                out,
                layout_out,
                out,
                layout_out,
                &self.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                gpu.stream()?.cast(),
            )
        };
        launched.map_err(|e| Error::Device {
            op: "cublasLtMatmul".into(),
            status: e.0 as i32,
            text: format!("{:?}", e.0),
            help: "the comparison is left out".into(),
        })
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.description);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// Creates the layout of a batch of contiguous matrices.
fn strided(
    matrix: Matrix,
    products: usize,
) -> Result<sys::cublasLtMatrixLayout_t, result::CublasError> {
    use sys::cublasLtMatrixLayoutAttribute_t::{
        CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
    };
    let (rows, columns, batch) = (matrix.rows as u64, matrix.columns as u64, products as i32);
    let kind = match matrix.f32 {
        true => sys::cudaDataType_t::CUDA_R_32F,
        false => sys::cudaDataType_t::CUDA_R_16BF,
    };
    let layout = result::create_matrix_layout(kind, rows, columns, rows as i64)?;
    let stride = (rows * columns) as i64;
    // SAFETY: the count is 32 bits, the stride 64, as cublasLt.h says.
    unsafe {
        result::set_matrix_layout_attribute(
            layout,
            CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
            (&raw const batch).cast(),
            4,
        )?;
        result::set_matrix_layout_attribute(
            layout,
            CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
            (&raw const stride).cast(),
            8,
        )?;
    }
    Ok(layout)
}

fn choose(
    handle: sys::cublasLtHandle_t,
    description: sys::cublasLtMatmulDesc_t,
    [a, b, out]: [sys::cublasLtMatrixLayout_t; 3],
) -> Result<sys::cublasLtMatmulAlgo_t, result::CublasError> {
    let preference = result::create_matmul_pref()?;
    let workspace = WORKSPACE as u64;
    let attribute =
        sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
    // SAFETY: the attribute is 64 bits; every handle was just made.
    unsafe {
        let set = result::set_matmul_pref_attribute(
            preference,
            attribute,
            (&raw const workspace).cast(),
            8,
        );
        let found = set.and_then(|()| {
            result::get_matmul_algo_heuristic(handle, description, a, b, out, out, preference)
        });
        let _ = result::destroy_matmul_pref(preference);
        found.map(|found| found.algo)
    }
}
