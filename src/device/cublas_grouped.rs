//! Matrix products through cuBLAS, loaded at run time: groups of any size in one call.

use super::cuda::{DeviceMemory, Gpu};
use crate::error::{Error, Result};
use cudarc::cublas::{result, sys};

/// Groups of products `result = a b`, on several sets of buffers.
pub struct Grouped<'a> {
    gpu: &'a Gpu,
    handle: sys::cublasHandle_t,
    groups: Vec<Group>,
    transposed: [bool; 2],
    /// Element type of the result.
    kind: sys::cudaDataType,
    /// Addresses of every group's A, B and result, on the GPU, for each set.
    addresses: Vec<[DeviceMemory; 3]>,
}

/// Column-major m, n, k, and the byte offsets of A, B and the result, with their leading dimensions.
pub struct Group {
    pub sizes: [usize; 3],
    pub at: [usize; 3],
    pub leading: [usize; 3],
}

impl<'a> Grouped<'a> {
    /// Prepares the products. The flags say whether a and b are transposed, and whether the result is f32 (otherwise
    /// bf16). `sets` are addresses of buffers: result, b, a.
    ///
    /// # Errors
    /// Returns one sentence when the library is missing or rejects the product.
    pub fn new(
        gpu: &'a Gpu,
        groups: Vec<Group>,
        transposed: [bool; 2],
        f32_result: bool,
        sets: &[Vec<*mut u8>],
    ) -> Result<Self, String> {
        // SAFETY: the function only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            return Err("libcublas.so.13 cannot be loaded".into());
        }
        let text = |e: Error| e.to_string();
        let stream = gpu.stream().map_err(text)?;
        let refused = |e: result::CublasError| format!("cuBLAS answers {:?}", e.0);
        let handle = result::create_handle().map_err(refused)?;
        let kind = match f32_result {
            true => sys::cudaDataType_t::CUDA_R_32F,
            false => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let mut grouped = Grouped {
            gpu,
            handle,
            groups,
            transposed,
            kind,
            addresses: Vec::new(),
        };
        // SAFETY: the handle was just made; the stream lives as long as the GPU.
        unsafe { result::set_stream(handle, stream.cast()) }.map_err(refused)?;
        for buffers in sets {
            let bases = [buffers[2], buffers[1], buffers[0]];
            let mut memory = Vec::new();
            for (operand, base) in bases.into_iter().enumerate() {
                let each = grouped.groups.iter();
                let addresses: Vec<u64> = each
                    .map(|g| (base as usize + g.at[operand]) as u64)
                    .collect();
                let bytes: &[u8] = bytemuck::cast_slice(&addresses);
                let mut block = gpu.allocate(bytes.len()).map_err(text)?;
                block.write(0, bytes).map_err(text)?;
                memory.push(block);
            }
            grouped
                .addresses
                .extend(<[DeviceMemory; 3]>::try_from(memory).ok());
        }
        grouped
            .launch(0)
            .and_then(|()| gpu.finish())
            .map_err(text)?;
        Ok(grouped)
    }

    /// Launches on the GPU's stream, with the buffers of one set.
    ///
    /// # Errors
    /// Returns an error when cuBLAS refuses.
    pub fn launch(&self, set: usize) -> Result<()> {
        let count = self.groups.len();
        let column = |of: &dyn Fn(&Group) -> usize| -> Vec<i32> {
            self.groups.iter().map(|g| of(g) as i32).collect()
        };
        let [m, n, k] = [0, 1, 2].map(|i| column(&|g| g.sizes[i]));
        let [lda, ldb, ldc] = [0, 1, 2].map(|i| column(&|g| g.leading[i]));
        let operation = |transposed| match transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let [a_op, b_op] = self.transposed.map(|t| vec![operation(t); count]);
        let (one, zero, size) = (vec![1f32; count], vec![0f32; count], vec![1i32; count]);
        let [a, b, c] = [0, 1, 2].map(|i| self.addresses[set][i].address());
        let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
        // SAFETY: every array has one entry per group; the arrays of addresses are in GPU memory.
        let status = unsafe {
            sys::cublasGemmGroupedBatchedEx(
                self.handle,
                a_op.as_ptr(),
                b_op.as_ptr(),
                m.as_ptr(),
                n.as_ptr(),
                k.as_ptr(),
                one.as_ptr().cast(),
                a as *const _,
                bf16,
                lda.as_ptr(),
                b as *const _,
                bf16,
                ldb.as_ptr(),
                zero.as_ptr().cast(),
                c as *const _,
                self.kind,
                ldc.as_ptr(),
                count as i32,
                size.as_ptr(),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            )
        };
        status.result().map_err(|e| Error::Device {
            op: "cublasGemmGroupedBatchedEx".into(),
            status: e.0 as i32,
            text: format!("{:?}", e.0),
            help: "the comparison is left out".into(),
        })
    }
}

impl Drop for Grouped<'_> {
    fn drop(&mut self) {
        let _ = self.gpu.finish();
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
